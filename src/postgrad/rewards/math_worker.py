"""The process in which math-verify works: it can be ended, which a thread that computes a giant power cannot.

A line of JSON in (``[answer, completion]``), a line of JSON out: true, false, or null where the row's answer is no
mathematics. Ends with its input. Started as a file, not imported, and so free of postgrad.
"""

from __future__ import annotations

import json
import resource
import sys

MEMORY = 4 << 30


def main() -> None:
    """Answer lines until there are no more."""
    # What is computed may print; only answers may go to the reader.
    answers, sys.stdout = sys.stdout, sys.stderr
    from math_verify import parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        answer, completion = json.loads(line)
        # The reader ends this process when it takes too long: the package's own alarm is not needed.
        # As LaTeX first: outside of it, only a number of \\frac{1}{2} would be found.
        marked = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
        gold = parse(marked, parsing_timeout=None) or parse(answer, parsing_timeout=None)
        right = None
        if gold:
            right = bool(verify(gold, parse(completion, parsing_timeout=None), timeout_seconds=None))
        print(json.dumps(right), file=answers, flush=True)


if __name__ == "__main__":
    main()
