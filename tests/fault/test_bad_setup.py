"""Wrong options, models, folders and data: the exit code, what is wrong, and the cure; never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tiny
from program import SMALL, Result, command, ending, fork, forked, reliability, rows_of, write_jsonl

RUN = Path("run")
SHORT = (*SMALL, "max_steps=2", "save_strategy=no")


@pytest.fixture
def base(model_folder: Callable[..., str], chat_file: Callable[..., str]) -> list[str]:
    return ["sft", "-m", model_folder("llama"), "-d", chat_file(8), "-o", "run", *SHORT]


def checks(run: Path = RUN) -> dict[str, dict[str, object]]:
    content = json.loads((run / "checks.json").read_text(encoding="utf-8"))
    return {check["name"]: check for check in content["checks"]}


def counts(run: Path = RUN) -> dict[str, int]:
    return json.loads((run / "checks.json").read_text(encoding="utf-8"))["counts"]


# -- options ----------------------------------------------------------------------------------------------------------


@reliability(1, "wrong option names and values", "exit 2; the option named, with the nearest known one")
@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("lerning_rate=1", ["lerning_rate", "did you mean 'learning_rate'"]),
        ("max_steps=many", ["max_steps", "integer"]),
        ("learning_rate=-1", ["learning_rate", "greater than or equal to 0"]),
        ("load_best_model_at_end=true", ["load_best_model_at_end", "eval_strategy"]),
        ("max_length=100000", ["max_length=100,000", "context of 512"]),
        ("eval_strategy=steps", ["eval_strategy needs held-out data"]),
        ("resume_from_checkpoint=true", ["resume_from_checkpoint", "postgrad resume"]),
    ],
)
def test_bad_option(cli: Callable[..., Result], base: list[str], option: str, words: list[str]) -> None:
    result = cli(*base, option)
    assert result.code == 2
    for word in words:
        assert word in result.text
    assert not (RUN / "model").exists()


def test_bad_config_file(cli: Callable[..., Result], base: list[str]) -> None:
    Path("config.yaml").write_text("learning_rat: 1e-5\n")
    result = cli(base[0], "config.yaml", *base[1:])
    assert result.code == 2 and "config.yaml" in result.text and "'learning_rate'" in result.text
    result = cli(base[0], "none.yaml", *base[1:])
    assert result.code == 2 and "none.yaml" in result.text


# -- models -----------------------------------------------------------------------------------------------------------


def broken_models(folder: str) -> Iterator[tuple[str, Path, list[str]]]:
    good = Path(folder)
    yield "missing", Path("no/such/model"), ["does not exist"]
    Path("file").write_text("x")
    yield "file", Path("./file"), ["is a file", "model folder"]
    Path("empty").mkdir()
    yield "empty", Path("./empty"), ["no config.json"]
    for name, gone in (("weights", "model.safetensors"), ("tokenizer", "tokenizer.json")):
        copy = Path(f"no-{name}")
        shutil.copytree(good, copy)
        (copy / gone).unlink()
        yield f"without {name}", copy, [str(copy)]
    cut = Path("cut")
    shutil.copytree(good, cut)
    (cut / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes()[:5000])
    yield "cut short", cut, ["cut"]
    damaged = Path("damaged")
    shutil.copytree(good, damaged)
    (damaged / "config.json").write_text('{"model_type": ')
    yield "damaged config", damaged, ["damaged"]


def test_bad_model(cli: Callable[..., Result], base: list[str]) -> None:
    tried = 0
    for name, path, words in broken_models(base[2]):
        result = cli("sft", "-m", str(path) if path.is_absolute() else f"./{path}", *base[3:])
        assert result.code == 2, (name, result.text)
        assert "→" in result.text and "Traceback" not in result.text, name
        for word in words:
            assert word in result.text, (name, result.text)
        tried += 1
    assert tried == 7


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, ("exploded",)


@reliability(16, "weights that run code when unpickled", "refused; the code never runs", trials=1)
def test_pickled_weights_are_never_read(cli: Callable[..., Result], base: list[str]) -> None:
    import torch

    shutil.copytree(base[2], "pickled")
    Path("pickled/model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Bomb()}, "pickled/pytorch_model.bin")
    result = cli("sft", "-m", "./pickled", *base[3:])
    assert result.code == 2 and "safetensors" in result.text
    assert not Path("exploded").exists()


@reliability(17, "a model that brings code (auto_map)", "refused without consent; the code never runs", trials=1)
def test_model_code_needs_consent(cli: Callable[..., Result], base: list[str]) -> None:
    shutil.copytree(base[2], "coded")
    config = json.loads(Path("coded/config.json").read_text())
    config.update(model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"})
    Path("coded/config.json").write_text(json.dumps(config))
    Path("coded/own.py").write_text("import os\nos.mkdir('exploded')\n")
    result = cli("sft", "-m", "./coded", *base[3:])
    assert result.code == 2 and "trust_remote_code" in result.text
    assert not Path("exploded").exists()


@reliability(6, "a template that writes no stop token", "exit 2 or 3 before the first step", trials=1)
def test_template_without_a_stop_token(cli: Callable[..., Result], base: list[str]) -> None:
    Path("t.jinja").write_text(tiny.CHATML.replace("<|im_end|>", ""))
    result = cli(*base, "chat_template_path=t.jinja")
    assert result.code == 3 and "stop token" in result.text and "chat_template_path" in result.text
    assert not (RUN / "metrics.jsonl").exists()


def test_no_template_gets_the_fallback(
    cli: Callable[..., Result], base: list[str], model_folder: Callable[..., str]
) -> None:
    result = cli("sft", "-m", model_folder("llama", None), *base[3:])
    assert result.code == 0 and "fallback" in result.text
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(RUN / "model")
    prompt = saved.apply_chat_template([{"role": "user", "content": "Q"}], tokenize=False, add_generation_prompt=True)
    assert prompt == "User: Q\nAssistant:"


# -- data -------------------------------------------------------------------------------------------------------------


@reliability(2, "broken JSON on a line", "exit 2 with file and line; left out and counted with skip_bad", trials=1)
def test_broken_line(cli: Callable[..., Result], base: list[str]) -> None:
    lines = [json.dumps(row) for row in tiny.chats(5)]
    lines[2] = lines[2][:-9]
    Path("bad.jsonl").write_text("\n".join(lines))
    result = cli(*base[:3], "-d", "bad.jsonl", *base[5:])
    assert result.code == 2 and "bad.jsonl:3" in result.text
    result = cli(*base[:3], "-d", "bad.jsonl", *base[5:], "skip_bad=true")
    assert result.code == 0
    assert (counts()["rows"], counts()["dropped"], counts()["examples"]) == (5, 1, 4)
    assert "1 dropped" in result.text and "1 of 5 rows" in result.text
    assert checks()["rows"]["rows"][0]["row"] == 3


@pytest.fixture
def long_rows(tmp_path: Path) -> str:
    rows = tiny.chats(6)
    for number in (1, 4):
        rows[number]["messages"][1]["content"] = "one two three " * 40
    return write_jsonl(tmp_path / "long.jsonl", rows)


@reliability(5, "rows over max_length", "exit 3 with their share and rows", trials=1)
def test_over_long_rows_are_refused(cli: Callable[..., Result], base: list[str], long_rows: str) -> None:
    result = cli(*base[:3], "-d", long_rows, *base[5:], "max_length=80")
    assert result.code == 3
    assert "2 of 6 rows (33.3%) are longer than 80 tokens" in result.text
    assert "long.jsonl:2" in result.text and "long.jsonl:5" in result.text and "excess_length_strategy" in result.text
    assert not (RUN / "metrics.jsonl").exists() and not (RUN / "before.jsonl").exists()


@pytest.mark.parametrize(("policy", "dropped", "truncated"), [("drop", 2, 0), ("truncate", 0, 2)])
def test_over_long_rows_are_counted(
    cli: Callable[..., Result], base: list[str], long_rows: str, policy: str, dropped: int, truncated: int
) -> None:
    result = cli(*base[:3], "-d", long_rows, *base[5:], "max_length=80", f"excess_length_strategy={policy}")
    assert result.code == 0
    assert (counts().get("dropped", 0), counts().get("truncated", 0)) == (dropped, truncated)
    assert counts()["examples"] == 6 - dropped
    assert [row["row"] for row in checks()["lengths"]["rows"]] == [2, 5]
    assert f"{dropped} dropped, {truncated} truncated" in result.text


@reliability(4, "rows without a trained token", "counted and left out; none left: exit 3", trials=1)
def test_nothing_to_train(cli: Callable[..., Result], base: list[str]) -> None:
    rows = tiny.chats(6)
    for row in rows:
        row["messages"][1]["weight"] = 0
    result = cli(*base[:3], "-d", write_jsonl(Path("zero.jsonl"), rows), *base[5:])
    assert result.code == 2 and "zero.jsonl:1" in result.text and "every assistant turn has weight 0" in result.text
    rows[3]["messages"][1]["weight"] = 1
    result = cli(*base[:3], "-d", write_jsonl(Path("one.jsonl"), rows), *base[5:], "skip_bad=true")
    assert result.code == 0 and "5 of 6 rows cannot be used" in result.text
    assert (counts()["rows"], counts()["dropped"], counts()["examples"]) == (6, 5, 1)


def test_nothing_left_after_truncation(cli: Callable[..., Result], base: list[str]) -> None:
    """Questions so long that no token of any answer is left."""
    rows = tiny.chats(4)
    for row in rows:
        row["messages"][0]["content"] = "one two three " * 40
    data = write_jsonl(Path("long.jsonl"), rows)
    result = cli(*base[:3], "-d", data, *base[5:], "max_length=80", "excess_length_strategy=truncate")
    assert result.code == 3 and "none of the 4 rows has anything to train" in result.text
    assert not (RUN / "metrics.jsonl").exists() and not (RUN / "model").exists()


def test_empty_and_single_row_data(cli: Callable[..., Result], base: list[str]) -> None:
    Path("none.jsonl").write_text("\n\n")
    result = cli(*base[:3], "-d", "none.jsonl", *base[5:])
    assert result.code == 2 and "none.jsonl" in result.text
    result = cli(*base[:3], "-d", write_jsonl(Path("single.jsonl"), tiny.chats(1)), *base[5:])
    assert result.code == 0 and rows_of(RUN / "metrics.jsonl")[-1]["step"] == 2


def test_heldout_rows_that_are_trained_on(cli: Callable[..., Result], base: list[str]) -> None:
    heldout = write_jsonl(Path("heldout.jsonl"), [*tiny.chats(3), *tiny.chats(4, 9)])
    result = cli(*base, f"eval_dataset_name={heldout}")
    assert result.code == 0 and "3 of 7 held-out prompts are also trained on" in result.text
    assert checks()["overlap"]["status"] == "warn"


# -- run directories --------------------------------------------------------------------------------------------------


def test_finished_run_is_kept(cli: Callable[..., Result], base: list[str]) -> None:
    assert cli(*base).code == 0
    first = (RUN / "environment.json").read_bytes()
    result = cli(*base)
    assert result.code == 0 and "run-2" in result.text
    assert (RUN / "environment.json").read_bytes() == first
    assert Path("run-2/model/config.json").exists()
    assert cli(*base).code == 0 and Path("run-3/model/config.json").exists()


def test_default_directory(cli: Callable[..., Result], base: list[str]) -> None:
    assert cli(*base[:5], *SHORT, "run_name=mine").code == 0
    assert Path("runs/mine/report.html").exists()


def test_unfinished_run_is_kept(cli: Callable[..., Result], base: list[str]) -> None:
    assert ending(fork(command(*base, "save_strategy=steps", "save_steps=1", before=_kill_before_the_end))) == -9
    result = cli(*base)
    assert result.code == 2 and "postgrad resume run" in result.text
    assert cli("resume", "run").code == 0


def _kill_before_the_end() -> None:
    from postgrad import pipeline

    pipeline.round_weights = lambda *_: os.kill(os.getpid(), 9)


def test_run_that_never_saved_is_over(cli: Callable[..., Result], base: list[str]) -> None:
    assert ending(fork(command(*base, before=_kill_before_the_end))) == -9
    assert cli(*base).code == 0 and Path("run-2/model/config.json").exists()


@reliability(15, "two processes on one run directory", "the second is refused with exit 2, the first goes on", trials=1)
def test_directory_in_use(cli: Callable[..., Result], base: list[str]) -> None:
    """A second process, and this one, while the first is training."""
    reading, writing = os.pipe()
    back_reading, back_writing = os.pipe()

    def wait_in_training() -> None:
        from postgrad.train import loop

        original = loop._gradient

        def gradient(*arguments: object) -> object:
            if not gradient_calls:
                gradient_calls.append(1)
                os.write(writing, b"x")
                os.read(back_reading, 1)
            return original(*arguments)

        gradient_calls: list[int] = []
        loop._gradient = gradient

    pid = fork(command(*base, "save_strategy=steps", "save_steps=1", before=wait_in_training))
    os.read(reading, 1)
    try:
        for arguments in (base, ["resume", "run"]):
            result = cli(*arguments)
            assert result.code == 2 and "in use by another process" in result.text
    finally:
        os.write(back_writing, b"x")
    assert ending(pid) == 0
    assert rows_of(RUN / "metrics.jsonl")[-1]["step"] == 2


def test_directory_that_is_no_run(cli: Callable[..., Result], base: list[str]) -> None:
    RUN.mkdir()
    (RUN / "thesis.txt").write_text("mine")
    result = cli(*base)
    assert result.code == 2 and "holds no run" in result.text
    assert [path.name for path in RUN.iterdir()] == ["thesis.txt"]
    for place in ("run/thesis.txt", "run/thesis.txt/below"):
        result = cli(*base[:6], place, *SHORT)
        assert result.code == 2 and place in result.text and "→" in result.text, place
    result = cli("resume", "run")
    assert result.code == 2 and "holds no run" in result.text


@pytest.mark.skipif(os.geteuid() != 0, reason="drops the rights of root to meet a folder without permission")
@pytest.mark.parametrize("place", ["closed/run", "closed", "readable"])
def test_folder_without_permission(cli: Callable[..., Result], base: list[str], place: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        for name, mode in (("closed", 0o700), ("readable", 0o755)):
            (Path(folder) / name).mkdir(mode=mode)

        def drop_rights() -> None:
            """Only when the run directory is made: model and data lie in folders of root."""
            from postgrad.runs import Run

            original = Run.create
            Run.create = lambda *arguments: (os.seteuid(65534), original(*arguments))[1]

        code, printed = forked(*base[:6], f"{folder}/{place}", *SHORT, before=drop_rights)
    assert code == 2, printed
    assert "Traceback" not in printed and place in printed and "choose another -o" in printed


def test_interrupted_before_the_run_began_leaves_nothing_in_the_way(
    cli: Callable[..., Result], base: list[str]
) -> None:
    """Killed between taking the directory and writing its first file."""
    RUN.mkdir()
    (RUN / ".lock").write_text("")
    assert cli(*base).code == 0
