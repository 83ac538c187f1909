"""Every example runs as its users run it: in a process of its own, from a folder of their own."""

from __future__ import annotations

import ast
import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
WORDS = {
    "card": "card arrive arrived delivery track lost waiting post",
    "rate": "rate exchange currency euro pound dollar convert price",
    "pin": "pin code blocked forgot change reset wrong number",
}


def run_example(name: str, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "COLUMNS": "160",
        "NO_COLOR": "1",
    }
    command = [sys.executable, "-W", "error::UserWarning", str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("01_first_adapter.py", "verified on onnxruntime: example, batch 5"),
        ("02_custom_attention.py", "verified on onnxruntime: example, batch 5, dimension 1 of size 41"),
        ("03_tabular.py", "worst values, onnxruntime"),
        ("06_qlora.py", "times less memory than float32, for both tasks together"),
        ("07_resume.py", "the second after step 120"),
        ("08_fsdp2.py", "the same 27 triplets as in one process"),
        ("09_time_series.py", "lstm.weight_hh_l0"),
        ("11_vision_as_lora.py", "text without images is the same bit for bit: True"),
        ("12_joint_start.py", "mirrored: accuracy"),
        ("13_compose_adapters.py", "accuracy on the new task: no adapter"),
        ("10_mixture_of_experts.py", "largest error of the file with its router on onnxruntime"),
    ],
)
def test_a_quick_example_holds_its_claims(name: str, line: str, tmp_path: Path) -> None:
    done = run_example(name, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert line in done.stdout
    assert list(tmp_path.iterdir()) == [], "it should leave nothing behind"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "needs", "line"),
    [
        ("libraries/01_causal_lm_trainer.py", "accelerate", "ranks: 60 triplets at 15 weights"),
        ("libraries/02_lightning.py", "lightning", "rotated digits: "),
        ("libraries/03_qlora_transformer.py", "bitsandbytes", "weights in nf4: "),
        ("libraries/04_diffusion_unet.py", "diffusers", "mean of drawn pixels: "),
    ],
)
def test_an_example_of_a_library_holds_its_claims(name: str, needs: str, line: str, tmp_path: Path) -> None:
    done = run_example(name, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (line if importlib.util.find_spec(needs) else f"skipped: {needs} is not installed") in done.stdout
    assert list(tmp_path.iterdir()) == [], "it should leave nothing behind"


def test_every_example_has_a_test() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    names = [path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.py")]
    assert [name for name in names if f'"{name}"' not in tests] == []


def test_every_example_has_a_line_in_the_readme() -> None:
    lines = re.findall(
        r"^- `([\w/]+\.py)`: .+\.$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert lines == sorted(path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.py"))


def test_examples_are_numbered_in_reading_order() -> None:
    for folder in (EXAMPLES, EXAMPLES / "libraries"):
        files = [path for path in sorted(folder.iterdir()) if path.is_file()]
        numbers = [re.fullmatch(r"(\d\d)_[a-z0-9_]+\.py", path.name) for path in files]
        assert [found and int(found[1]) for found in numbers] == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: path.stem)
def test_an_example_says_what_it_shows_and_how_to_run_it(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first, *rest = docstring.splitlines()
    assert first.endswith(".") and len(first.split()) > 5, f"{path.name} begins with {first!r}, expected what it shows"
    assert rest[:1] == [""] and rest[1].startswith(f"    python {path.relative_to(ROOT).as_posix()}"), rest[:2]


def test_multi_task_serving_names_the_data_it_needs(tmp_path: Path) -> None:
    done = run_example("05_multi_task_serving.py", "--data", tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert f"--data {tmp_path} has no folder banking77; expected" in done.stderr


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT and a tokenizer with a vocabulary of whole words."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("encoder")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*special, "my", "the", "please", *" ".join(WORDS.values()).split()]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def make_rows(count: int) -> list[tuple[str, str]]:
    """Sentences of three to eight words, most of them the class's own, in a fixed order."""
    rows = []
    for i in range(count):
        category = list(WORDS)[i % 3]
        words = WORDS[category].split()
        own = [words[(i + k * (1 + i % 3)) % len(words)] for k in range(2 + i % 5)]
        rows.append((" ".join(["please my", *own]), category))
    return rows


def write_csv(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for split, count in (("train", 90), ("test", 75)):
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "category"), *make_rows(count)])
    return folder


def write_json(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    splits = {"train": make_rows(90), "test": make_rows(75), "oos_test": [("what is the weather", "oos")]}
    (folder / "data_full.json").write_text(json.dumps(splits), encoding="utf-8")
    return folder


@pytest.mark.slow
def test_text_classification_end_to_end(encoder: Path, tmp_path: Path) -> None:
    """The printed accuracies are measured here once more, from the file alone."""
    data, out = write_csv(tmp_path / "data"), tmp_path / "result"
    options = ["--limit", "60", "--steps", "12", "--batch-size", "8", "--lr", "0.02", "--seed", "3"]
    done = run_example(
        "04_text_classification.py", "--model", encoder, "--data", data, "--out", out, *options, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 training texts, 75 test texts, 3 classes" in done.stdout
    assert "48 triplets at 6 weights" in done.stdout
    assert sorted(path.name for path in out.iterdir()) == ["adapted.onnx", "adapters.safetensors", "base.onnx"]
    for name in ("base", "adapted"):
        in_torch, on_onnx = re.findall(
            r"([\d.]+)%", next(line for line in done.stdout.splitlines() if f" {name} (" in line)
        )
        assert in_torch == on_onnx == f"{measure_file(out / f'{name}.onnx', encoder):.2f}"


def measure_file(path: Path, encoder: Path) -> float:
    """Accuracy in percent of an ONNX file on the test rows, one text at a time, so without any padding."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    model = onnx.load(path)
    for value in model.graph.input:
        assert [bool(dimension.dim_param) for dimension in value.type.tensor_type.shape.dim] == [True, True]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    right = 0
    rows = make_rows(75)
    for text, category in rows:
        ids = np.array([tokenizer(text)["input_ids"]])
        logits = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
        right += sorted(WORDS)[int(logits.argmax())] == category
    return 100 * right / len(rows)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("text_classification", EXAMPLES / "04_text_classification.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("write", [write_csv, write_json], ids=["banking77", "clinc150"])
def test_the_files_tell_the_data_set(
    example: ModuleType, encoder: Path, tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    tokenizer, _ = example.load_model(encoder)
    training, test, classes = example.read_data(write(tmp_path / "data"), tokenizer, limit=60, seed=0)
    assert classes == sorted(WORDS)
    assert (len(training.labels), len(test.labels)) == (60, 75)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in test.tokens]
    assert list(zip(texts, [classes[i] for i in test.labels], strict=True)) == make_rows(75)


def empty(folder: Path) -> None:
    folder.mkdir()


def other_columns(folder: Path) -> None:
    write_csv(folder)
    (folder / "train.csv").write_text("sentence,label\nx,y\n", encoding="utf-8")


def no_rows(folder: Path) -> None:
    write_csv(folder)
    (folder / "test.csv").write_text("text,category\n", encoding="utf-8")


def no_test_file(folder: Path) -> None:
    write_csv(folder)
    (folder / "test.csv").unlink()


def no_test_split(folder: Path) -> None:
    write_json(folder)
    (folder / "data_full.json").write_text('{"train": [["x", "y"]]}', encoding="utf-8")


def new_class(folder: Path) -> None:
    write_csv(folder)
    (folder / "test.csv").write_text("text,category\nhello,greeting\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (empty, r"holds neither train\.csv .* nor data_full\.json"),
        (other_columns, r"train\.csv has columns \['sentence', 'label'\], expected text and category"),
        (no_rows, "the test split in .* is empty"),
        (no_test_file, r"holds neither test\.csv"),
        (no_test_split, r"has splits \['train'\], expected 'test' among them"),
        (new_class, r"the test split has classes that the training split lacks: \['greeting'\]"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_data_that_cannot_be_read_is_named(
    example: ModuleType, tmp_path: Path, prepare: Callable[[Path], None], message: str
) -> None:
    prepare(tmp_path / "data")
    with pytest.raises(SystemExit, match=message):
        example.read_data(tmp_path / "data", tokenizer=None, limit=None, seed=0)


def test_a_folder_without_a_model_is_named(example: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"holds no config\.json"):
        example.load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit, match="transformers cannot load"):
        example.load_model(tmp_path)


@pytest.fixture
def two_rows(example: ModuleType) -> object:
    return example.Split(tokens=[], labels=torch.tensor([0, 1]), tokenizer=None)


def test_a_tie_may_fall_either_way(example: ModuleType, two_rows: object) -> None:
    logits = torch.tensor([[1.0, 1.0 - 1e-6], [0.0, 1.0]])
    rounded = torch.tensor([[1.0 - 1e-5, 1.0 - 1e-6], [0.0, 1.0]])
    found = example.compare(Path("model.onnx"), logits, rounded, two_rows)
    assert (found.torch, found.onnxruntime, found.differing) == (1.0, 0.5, 1)


def test_another_prediction_ends_the_program(example: ModuleType, two_rows: object) -> None:
    logits = torch.tensor([[1.0, 0.9], [0.0, 1.0]])
    wrong = torch.tensor([[0.9, 1.0], [0.0, 1.0]])
    with pytest.raises(SystemExit, match=r"1 predictions on onnxruntime are not PyTorch's; at row 0 .* 1\.0e-01 apart"):
        example.compare(Path("model.onnx"), logits, wrong, two_rows)
