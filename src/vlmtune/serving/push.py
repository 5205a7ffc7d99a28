"""``vlmtune push``: a model or adapter to the Hugging Face Hub, private unless told otherwise, with its card."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub import errors as hub_errors

from vlmtune.config.serving import PushArguments
from vlmtune.errors import ConfigError, ModelError, OutputError
from vlmtune.evaluation.card import CARD, write_card
from vlmtune.models.checkpoint import is_adapter_dir

logger = logging.getLogger("vlmtune.push")
# What a model or adapter is made of. Records of the run, answers and checkpoints, which hold data, stay here.
FILES = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json"),
    *("*processor*_config.json", "processor_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template*", "LICENSE*", CARD),
)
_SECRET = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{20,}|ghp_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16})\b")


def files_to_push(folder: Path) -> list[Path]:
    """Return the files of a model or adapter, and nothing else of its folder.

    Raises:
        ModelError: the folder holds neither.
        OutputError: a file holds what looks like a key.
    """
    if not is_adapter_dir(folder) and not (folder / "config.json").exists():
        raise ModelError(f"{folder} holds no model and no adapter, so there is nothing to push.")
    found = sorted({file for pattern in FILES for file in folder.glob(pattern) if file.is_file()})
    if not any(file.suffix == ".safetensors" for file in found):
        raise ModelError(f"{folder} holds no safetensors weights. Name a run's or a merged model's folder.")
    for file in found:
        if file.suffix != ".safetensors" and _SECRET.search(file.read_text(encoding="utf-8", errors="replace")):
            raise OutputError(f"{file} holds what looks like an access key, so nothing was pushed. Take it out.")
    return found


def push(folder: Path, repository: str, args: PushArguments) -> str:
    """Push a folder's model or adapter, in one commit; return its address.

    Raises:
        ModelError: the folder holds nothing to push.
        OutputError: the Hub refuses, or the repository is public and that was not asked for.
        ConfigError: the repository's name cannot be one.
    """
    if "/" not in repository:
        raise ConfigError(f"{repository!r} is no name of a repository. Write OWNER/NAME.")
    files_to_push(folder)
    if not write_card(folder):
        logger.info("%s is your own and stays as it is", folder / CARD)
    files = files_to_push(folder)
    api = HfApi()
    try:
        address = api.create_repo(repository, private=not args.public, exist_ok=True)
        if not args.public and not api.repo_info(repository).private:
            raise OutputError(
                f"{repository} is there already and everyone can see it. Set public to push to it, or name another."
            )
        if args.revision:
            api.create_branch(repository, branch=args.revision, exist_ok=True)
        api.create_commit(
            repository,
            [CommitOperationAdd(file.name, file) for file in files],
            commit_message=args.message or "Pushed by vlmtune",
            revision=args.revision,
        )
    except hub_errors.HFValidationError as error:
        raise ConfigError(f"{repository!r} is no name of a repository: {error}") from error
    except hub_errors.OfflineModeIsEnabled as error:
        raise OutputError("The Hub cannot be reached: HF_HUB_OFFLINE is set. Unset it to push.") from error
    # The base of all its HTTP library's errors, whichever library a version of huggingface_hub has.
    except (hub_errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        said = " ".join(str(error).split())[:300]
        raise OutputError(
            f"The Hub did not take {folder} as {repository} ({said}). Log in by `hf auth login` with a token that may "
            "write."
        ) from error
    return str(address)
