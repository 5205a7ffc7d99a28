"""Whether other programs take a merged model: their loaders and converters, as far as they are installed."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from vlmtune.errors import ModelError
from vlmtune.models.families import get_family
from vlmtune.models.loading import load_config
from vlmtune.models.merge import MERGE_FILE, checkpoint_folder, weight_files
from vlmtune.models.places import module_names

CONVERTER = "convert_hf_to_gguf.py"
SECONDS = 1800
# Architectures whose name in llama.cpp is another than transformers'.
GGUF_NAMES = {"mistral": "llama", "qwen2_5_vl": "qwen2vl"}
GGUF_FORMATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# The converter gives these another name before it looks them up.
GGUF_TENSORS = {".linear_attn.dt_bias": ".linear_attn.dt_proj.bias"}
LOAD_IN_VLLM = "import sys; from vllm import LLM; LLM(model=sys.argv[1], enforce_eager=True, max_num_seqs=1)"


@dataclass(frozen=True)
class ServeCheck:
    """What one program makes of a model.

    Attributes:
        name: of the program, or of what is compared.
        outcome: ``failed`` is the only one that says something against the model.
        words: what was done, what was found, or why nothing was done.
    """

    name: str
    outcome: Literal["passed", "failed", "not installed", "not checked"]
    words: str


def check_serving(folder: str | Path, base: str | Path | None = None) -> list[ServeCheck]:
    """Run the loaders and converters that are installed on a merged model.

    Args:
        folder: what ``vlmtune merge`` wrote.
        base: the base model, where it is no longer where the merge found it.

    Raises:
        ModelError: the folder is no merged model, or its base is gone.
    """
    folder = Path(folder).expanduser()
    try:
        record = json.loads((folder / MERGE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} has no {MERGE_FILE} that can be read, so vlmtune merge did not make it.") from error
    origin = checkpoint_folder(base or record["base_model"], revision=record.get("revision"))
    checks = [_layout(folder, origin), _gguf(folder), *_converter(folder, origin)]
    checks.append(_vllm(folder))
    return [*checks, ServeCheck("SGLang, Ollama", "not checked", "vlmtune runs neither")]


def format_checks(checks: list[ServeCheck]) -> str:
    """Return the checks as lines for people."""
    return "\n".join(f"  {check.outcome:13}  {check.name}: {check.words}" for check in checks)


def _layout(folder: Path, base: Path) -> ServeCheck:
    name = "the base's layout"
    try:
        old, new = _tensors(base), _tensors(folder)
    except ModelError as error:
        return ServeCheck(name, "failed", str(error))
    wrong = sorted(tensor for tensor in old.keys() | new.keys() if old.get(tensor) != new.get(tensor))
    if wrong:
        return ServeCheck(
            name,
            "failed",
            f"{len(wrong)} tensors are absent, added, or of another file, format or shape, such as {wrong[0]}",
        )
    if _json(folder / "config.json") != _json(base / "config.json"):
        return ServeCheck(name, "failed", "config.json says other than the base's")
    return ServeCheck(name, "passed", f"{len(new)} tensors with its names, formats and shapes; the same config.json")


def _tensors(folder: Path) -> dict[str, tuple[str, str, list[int]]]:
    """File, format and shape of every tensor."""
    found = {}
    for file in weight_files(folder):
        try:
            with safe_open(str(file), framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    tensor = opened.get_slice(name)
                    found[name] = (file.name, tensor.get_dtype(), tensor.get_shape())
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} is no whole safetensors file ({error}).") from error
    return found


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _gguf(folder: Path) -> ServeCheck:
    name = "the gguf package"
    if importlib.util.find_spec("gguf") is None:
        return ServeCheck(name, "not installed", "pip install gguf")
    import gguf

    config = load_config(folder)
    text = config.get_text_config()
    kind = str(text.model_type).removesuffix("_text")
    wanted = GGUF_NAMES.get(kind, kind.replace("_", ""))
    arch = next((arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == wanted), None)
    if arch is None:
        return ServeCheck(name, "not checked", f"it has no architecture of the name {wanted}")
    known = gguf.get_tensor_name_map(arch, text.num_hidden_layers)
    asked = dict(_language_names(folder, config))
    places = {own: known.get_name(looked_up, try_suffixes=(".weight", ".bias")) for own, looked_up in asked.items()}
    lost = [asked[own] for own, place in places.items() if place is None]
    if lost:
        return ServeCheck(name, "failed", f"its {wanted} has no place for {len(lost)} tensors, such as {lost[0]}")
    changed = [place for own, place, same in _through_gguf(folder, places, wanted) if not same]
    if changed:
        return ServeCheck(name, "failed", f"{len(changed)} tensors come back changed, such as {changed[0]}")
    return ServeCheck(
        name,
        "passed",
        f"its {wanted} has a place for the language model's {len(asked)} tensors, which come back as they were "
        "written; not asked: the tokenizer and images",
    )


def _through_gguf(folder: Path, places: Mapping[str, str], architecture: str) -> Iterator[tuple[str, str, bool]]:
    """Write each tensor into a GGUF file of its own and read it: its name, its name there, and whether it is equal."""
    import gguf

    with tempfile.TemporaryDirectory(prefix="vlmtune-gguf-") as scratch:
        path = Path(scratch) / "tensor.gguf"
        for file in weight_files(folder):
            with safe_open(str(file), framework="pt") as opened:
                for own in places.keys() & set(opened.keys()):
                    tensor = opened.get_tensor(own).contiguous()
                    kind = GGUF_FORMATS.get(tensor.dtype)
                    if kind is None:
                        yield own, f"{places[own]} (in {tensor.dtype})", False
                        continue
                    numbers = tensor.view(torch.uint8 if tensor.dtype == torch.bfloat16 else tensor.dtype).numpy()
                    writer = gguf.GGUFWriter(path, architecture)
                    writer.add_tensor(places[own], numbers, raw_dtype=gguf.GGMLQuantizationType[kind])
                    writer.write_header_to_file()
                    writer.write_kv_data_to_file()
                    writer.write_tensors_to_file()
                    writer.close()
                    (found,) = gguf.GGUFReader(path).tensors
                    same = found.name == places[own] and found.shape.tolist() == list(reversed(tensor.shape))
                    yield own, places[own], same and found.data.tobytes() == numbers.tobytes()


def _language_names(folder: Path, config: Any) -> Iterator[tuple[str, str]]:
    """The language model's tensors by name, with the name that llama.cpp's converter looks up."""
    parts = get_family(config).parts
    for own, place in module_names(config, _tensors(folder)).items():
        if place.startswith(parts["language"] + "."):
            name = "model." + place.removeprefix(parts["language"] + ".")
            ending = next((ending for ending in GGUF_TENSORS if name.endswith(ending)), None)
            yield own, name if ending is None else name.removesuffix(ending) + GGUF_TENSORS[ending]
        elif place.startswith("lm_head."):
            yield own, place


def _converter(folder: Path, base: Path) -> list[ServeCheck]:
    program = shutil.which(CONVERTER)
    if program is None:
        return [ServeCheck(f"llama.cpp's {CONVERTER}, also with --mmproj", "not installed", "it is not on PATH")]
    checks = []
    with tempfile.TemporaryDirectory(prefix="vlmtune-gguf-") as scratch:
        for name, more in ((CONVERTER, []), (f"{CONVERTER} --mmproj", ["--mmproj"])):
            # A dry run maps every tensor and reads the vocabulary, and writes no second copy of the weights.
            options = ["--outfile", str(Path(scratch) / "model.gguf"), "--dry-run", *more]
            check = _run(f"llama.cpp's {name}", [program, str(folder), *options], "a dry run; the file was not made")
            if check.outcome == "failed" and _run("", [program, str(base), *options], "").outcome == "failed":
                check = replace(check, words=f"{check.words} (it refuses the base too)")
            checks.append(check)
    return checks


def _vllm(folder: Path) -> ServeCheck:
    if importlib.util.find_spec("vllm") is None:
        return ServeCheck("vLLM", "not installed", "it cannot be imported")
    if not torch.cuda.is_available():
        return ServeCheck("vLLM", "not checked", "it is installed, but there is no GPU for it")
    torch.cuda.empty_cache()
    return _run("vLLM", [sys.executable, "-c", LOAD_IN_VLLM, str(folder)], "it loads the model; nothing was asked")


def _run(name: str, command: list[str], passed: str) -> ServeCheck:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return ServeCheck(name, "failed", f"it did not end within {SECONDS} s")
    except OSError as error:
        return ServeCheck(name, "failed", f"it cannot be started ({error.strerror})")
    if done.returncode == 0:
        return ServeCheck(name, "passed", passed)
    said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1][:300]
    return ServeCheck(name, "failed", f"it ended with code {done.returncode}: {said}")
