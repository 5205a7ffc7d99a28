"""The command line: a file a command, wiring only.

Exit codes: 0 done, 1 a failure while working (data, model, training), 2 a mistake in options or recipe, 75 a training
that SIGTERM or SIGINT ended after its step, saved (the same command goes on), 130 or 143 ended at once by those.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from vlmtune.cli.cache_features import cache_features
from vlmtune.cli.chat import chat
from vlmtune.cli.check import check
from vlmtune.cli.common import SAVED_AND_STOPPED, set_up_output
from vlmtune.cli.compare import compare
from vlmtune.cli.convert import convert
from vlmtune.cli.demo import demo
from vlmtune.cli.env import env
from vlmtune.cli.estimate import estimate
from vlmtune.cli.evaluate import evaluate
from vlmtune.cli.families import families
from vlmtune.cli.launch import leave_group, leave_reason
from vlmtune.cli.merge import merge
from vlmtune.cli.metrics import metrics
from vlmtune.cli.predict import predict
from vlmtune.cli.preview import preview
from vlmtune.cli.push import push
from vlmtune.cli.report import report
from vlmtune.cli.serve import serve
from vlmtune.cli.train import train
from vlmtune.config.secrets import redact
from vlmtune.errors import ConfigError, StoppedBySignal, VlmtuneError, nearest

OVERVIEW = """\
vlmtune fine-tunes vision-language models on your own images, and says whether it worked.

usage: vlmtune COMMAND [...]

commands:
  check RECIPE|DATA [--option value ...]  look at data before training: every image, every text, every token count
  preview RECIPE|DATA [--option value ...] show rows as the model will see them, learned tokens in colour
  convert DATA --to TARGET --output DIR   write data of any format as messages JSONL, Parquet or WebDataset shards
  train [RECIPE] [--option value ...]     fine-tune a model as a YAML recipe says; flags override it
  estimate [RECIPE] [--option value ...]  how much memory a training takes, and on which GPUs it fits
  evaluate [RECIPE] [--option value ...]  generate answers, score them, compare with another evaluation
  merge ADAPTER OUTPUT_DIR [--option ...] merge an adapter into its base model, and check the result
  push FOLDER OWNER/NAME [--option ...]   publish a model or adapter on the Hugging Face Hub, private by default
  report FOLDER ... [--output FILE]       write a page of runs and evaluations: scores, pictures, curves
  compare RUN RUN ... [--output FILE]     compare runs: recipes, scores with intervals, samples that flipped
  metrics                                 list the metrics
  predict MODEL IMAGE ... [--prompt TEXT] answer questions about images, folders of them, or files of questions
  chat MODEL [--option value ...]         talk with a model in the terminal, with images by path
  serve MODEL [--option value ...]        serve a model to programs that speak OpenAI's chat API
  demo [--output_dir DIR]                 tune the tiny model that comes with vlmtune, and show what it learned
  cache-features [RECIPE] [--option ...]  compute image features ahead of training
  families                                list the families of models, and what is supported for each
  env [--json]                            show versions and hardware, for reports of problems

`vlmtune COMMAND --help` lists a command's options, `vlmtune --version` shows the version. --debug, with any command,
shows the traceback of an error.
"""

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "check": check,
    "preview": preview,
    "convert": convert,
    "train": train,
    "estimate": estimate,
    "evaluate": evaluate,
    "merge": merge,
    "push": push,
    "report": report,
    "compare": compare,
    "metrics": metrics,
    "predict": predict,
    "chat": chat,
    "serve": serve,
    "cache-features": cache_features,
    "demo": demo,
    "families": families,
    "env": env,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(OVERVIEW, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"vlmtune {version('vlmtune')}")
        return 0
    command = COMMANDS.get(arguments[0])
    try:
        if command is None:
            raise ConfigError(
                f"There is no command {arguments[0]!r}.{nearest(arguments[0], COMMANDS)} See vlmtune --help."
            )
        set_up_output()
        code = command(arguments[1:])
        leave_group()
        return code
    except StoppedBySignal as error:
        leave_group()
        if not leave_reason(error):
            print(f"stopped: {error}", file=sys.stderr)
        return SAVED_AND_STOPPED
    except VlmtuneError as error:
        if debug:
            print(redact(traceback.format_exc()), end="", file=sys.stderr)
        if not leave_reason(error):
            print(redact(f"error: {error}"), file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except BrokenPipeError:
        # The reader, such as `head`, has gone; Python would complain once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("stopped; what was written so far stays", file=sys.stderr)
        return 130
    except Exception as error:
        if leave_reason(error):
            return 1
        raise
