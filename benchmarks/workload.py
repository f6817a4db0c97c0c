"""What is measured: workloads, grouped into suites, and who takes part in each."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

STEP_TOKENS = 16_384
MEAN_DOCUMENT = 400
SCALING_STEPS = 12


@dataclass(frozen=True, slots=True)
class Workload:
    """One table of the report.

    Args:
        name: for people, and for ``--only``.
        model: a name that :func:`benchmarks.shapes.build_model` knows.
        rows: number of documents.
        per_device_train_batch_size, gradient_accumulation_steps: documents of one optimizer step.
        contenders: who takes part unless ``--contenders`` says otherwise.
        documents: ``random`` ids, or ``chats`` of the demo data in the model's own template.
        document_tokens: give every random document this length; None: log-normal, about 400.
        environment: variables of the measured process.
        needs: a processor flag without which the workload means nothing.
        adapters: LoRA is trained, so that no gradients of the weights are computed.
        axis: the quantity that a scaling curve varies; ``at`` is this point's value.
    """

    name: str
    model: str
    rows: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    contenders: tuple[str, ...]
    documents: str = "random"
    document_tokens: int | None = None
    environment: dict[str, str] = field(default_factory=dict)
    needs: str | None = None
    axis: str | None = None
    at: float | None = None
    adapters: bool = False

    @property
    def examples_per_step(self) -> int:
        """Documents of one optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def describe(self) -> dict[str, Any]:
        """Everything that makes two measurements comparable; who takes part does not."""
        facts = asdict(self)
        del facts["contenders"]
        if not self.adapters:  # results from before it existed stay comparable
            del facts["adapters"]
        return facts


CPU = ("postgrad", "trl", "trl-tuned", "transformers")
TUTORIAL = ("postgrad-eager", "postgrad-compiled", "trl", "trl-nockpt")
LARGE = ("postgrad-compiled", "trl-best")  # too few steps for postgrad to choose compiling by itself
LEAN = ("postgrad-adamw-bf16", "postgrad-adamw-8bit")
LORA = ("postgrad-lora", "trl-best-lora", "trl-best-lora-ckpt")
QLORA = ("postgrad-qlora", "trl-best-qlora", "trl-best-qlora-ckpt")
LARGE_MODEL = ("postgrad-compiled", "trl-best-ckpt")  # without recomputed activations it does not fit
SIZES = {"qwen3-0.6b": ("Qwen3-0.6B", 0.6), "qwen3-1.7b": ("Qwen3-1.7B", 1.7), "qwen3-4b": ("Qwen3-4B", 4.0)}


def _cpu() -> list[Workload]:
    chats = ("smollm2-demo", 24, 1, 8, CPU, "chats")
    return [
        Workload("SmolLM2-135M, tutorial settings", *chats),
        Workload(
            "SmolLM2-135M, tutorial settings, AMX switched off",
            *chats,
            environment={"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
            needs="amx_bf16",
        ),
    ]


def _h100() -> list[Workload]:
    return [
        Workload("Qwen3-0.6B shape, tutorial settings", "qwen3-0.6b", 160, 1, 8, TUTORIAL),
        Workload("SmolLM2-135M shape, tutorial settings", "smollm2-135m", 160, 1, 8, TUTORIAL),
        Workload("Qwen3-0.6B shape, 40 documents a step", "qwen3-0.6b", 1200, 40, 1, (*LARGE, *LEAN, "trl-bf16")),
        Workload("Qwen3-1.7B shape, 40 documents a step", "qwen3-1.7b", 800, 40, 1, LARGE),
        Workload("Qwen3-4B shape, 40 documents a step", "qwen3-4b", 400, 40, 1, LARGE_MODEL),
        Workload("Qwen3-4B shape, LoRA of rank 16", "qwen3-4b", 400, 40, 1, LORA, adapters=True),
        Workload("Qwen3-4B shape, QLoRA of rank 16", "qwen3-4b", 400, 40, 1, QLORA, adapters=True),
    ]


def _scaling() -> list[Workload]:
    """postgrad alone, a few steps a point, along three axes."""
    points = []
    for length in (128, 512, 2048, 8192):
        count = STEP_TOKENS // length
        point = _point("qwen3-0.6b", count, "tokens a document", length)
        points.append(replace(point, name=f"Scaling, documents of {length} tokens", document_tokens=length))
    for count in (1, 4, 16, 64):
        point = _point("qwen3-0.6b", count, "documents a step", count)
        points.append(replace(point, name=f"Scaling, {count} document{'s' if count > 1 else ''} a step"))
    for model, (title, billions) in SIZES.items():
        point = _point(model, STEP_TOKENS // MEAN_DOCUMENT, "parameters (billions)", billions)
        points.append(replace(point, name=f"Scaling, {title} shape"))
    return points


def _point(model: str, documents: int, axis: str, at: float) -> Workload:
    return Workload("", model, documents * SCALING_STEPS, documents, 1, ("postgrad",), axis=axis, at=float(at))


SUITES: dict[str, list[Workload]] = {
    "cpu": _cpu(),
    "h100": _h100(),
    "scaling": _scaling(),
    "cpu-shape": [
        Workload("SmolLM2-135M shape, tutorial settings, 2 cores", "smollm2-135m", 16, 1, 8, CPU),
        Workload(
            "SmolLM2-135M shape, tutorial settings, 2 cores, AMX switched off",
            "smollm2-135m",
            16,
            1,
            8,
            CPU,
            environment={"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
            needs="amx_bf16",
        ),
    ],
    "smoke": [
        Workload("Tiny model, one step", "tiny", 4, 1, 4, ("postgrad", "trl", "transformers"), document_tokens=24)
    ],
}


def find(suite: str, name: str) -> Workload:
    """The workload of this name in a suite."""
    return next(workload for workload in SUITES[suite] if workload.name == name)
