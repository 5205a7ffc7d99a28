"""The public names: imported lazily, documented, the same in ``utils``; the scripts that check them pass."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vlmtune

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def _script(name: str):
    spec = importlib.util.spec_from_file_location(Path(name).name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=environment, timeout=120
    )


@pytest.fixture
def validate(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    return _script("validate_refactoring")


def test_the_checks_pass_from_any_directory(tmp_path: Path):
    done = _python(str(SCRIPTS / "validate_refactoring.py"), cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines[-1] == "all checks passed" and all(line.startswith("ok ") for line in lines[:-1])
    assert not list(tmp_path.iterdir())


def test_the_unit_tests_pass_from_any_directory(tmp_path: Path):
    done = _python(str(SCRIPTS / "test_refactored_training.py"), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.rpartition(" passed")[0].split()[-1]) >= 10


def test_a_failed_check_is_named_and_fails_the_script(validate, monkeypatch, capsys):
    monkeypatch.setattr(validate, "API", {"model_utils": "setup_lora load_modle"})
    monkeypatch.setattr(validate, "example_runs", lambda: None)
    assert validate.main() == 1
    said = capsys.readouterr().out
    assert "FAILED  utils.model_utils: its 2 names exist" in said and "load_modle does not exist" in said


def test_code_in_utils_and_a_long_script_are_found(validate, monkeypatch, tmp_path: Path):
    (tmp_path / "utils").mkdir()
    for name in ("__init__", *validate.API):
        (tmp_path / "utils" / f"{name}.py").write_text('"""Names."""\nfrom vlmtune import Sample\n')
    monkeypatch.setattr(validate, "ROOT", tmp_path)
    validate.utils_are_thin()
    (tmp_path / "utils" / "model_utils.py").write_text("def load():\n    return 1\n")
    with pytest.raises(AssertionError, match=r"model_utils\.py, line 1, is code: def load"):
        validate.utils_are_thin()
    (tmp_path / "script.py").write_text("pass\n" * 241)
    monkeypatch.setattr(validate, "SCRIPT", tmp_path / "script.py")
    with pytest.raises(AssertionError, match="241 lines"):
        validate.script_is_short()


def test_every_public_name_can_be_imported_and_is_documented():
    for name in vlmtune.__all__:
        assert getattr(vlmtune, name).__doc__, name


def test_importing_vlmtune_imports_nothing_heavy():
    code = (
        "import sys, vlmtune; dir(vlmtune)\n"
        "print([name for name in ('torch', 'transformers', 'peft', 'datasets', 'PIL') if name in sys.modules])"
    )
    assert _python("-c", code).stdout.strip() == "[]"


def test_names_are_listed():
    listed = dir(vlmtune)
    assert {"load_model_for_training", "VlmtuneError", "__version__"} <= set(listed)
    assert set(vlmtune.__all__) <= set(listed) and len(listed) == len(set(listed))
    assert vlmtune.__version__.count(".") == 2


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        _ = vlmtune.load_modle
    with pytest.raises(ImportError):
        exec("from vlmtune import load_modle")


def test_the_training_script_trains_by_flags_or_recipe_and_resumes(
    validate, tiny_gemma3_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    script = _script("training/train_gemma3_vlm")
    data, out = validate.flickr_folder(tmp_path / "flickr"), tmp_path / "run"
    options = {
        "model_name_or_path": tiny_gemma3_dir,
        "dataset_path": data,
        "output_dir": out,
        "validation_fraction": 0.5,
        "max_steps": 2,
        "learning_rate": "1e-3",
        "disable_tqdm": "true",
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("".join(f"{name}: {value}\n" for name, value in options.items()))

    def run(*arguments: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["train_gemma3_vlm.py", *arguments])
        script.main()
        return json.loads((out / "run.json").read_text())

    record = run(*(f"--{name}={value}" for name, value in options.items()))
    assert record["status"] == "finished" and record["metrics"]["eval_loss"] > 0 and record["data"]["fingerprint"]
    assert record["arguments"]["training"]["learning_rate"] == 1e-3
    with pytest.raises(vlmtune.VlmtuneError, match="already holds a finished run"):
        run(str(recipe))
    run(str(recipe), "--max_steps", "3", "--resume", "--force_resume")
    assert (out / "checkpoint-3" / "chat_template.jinja").exists() and (out / "adapter_model.safetensors").exists()
    with pytest.raises(vlmtune.VlmtuneError, match="There is no model at"):
        run(str(recipe), "--output_dir", str(tmp_path / "other"), "--model_name_or_path", "./nowhere")
    with pytest.raises(vlmtune.VlmtuneError, match="eval_answers works with `vlmtune train`"):
        run(str(recipe), "--eval_strategy", "epoch", "--eval_answers", "2")
