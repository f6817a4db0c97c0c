"""Speed and memory of postgrad beside other trainers: see ``benchmarks.run`` and ``benchmarks.report``."""
