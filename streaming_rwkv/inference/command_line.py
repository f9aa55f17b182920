"""Command lines of generate, evaluate, export and average, which check arguments and paths before torch is imported."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from streaming_rwkv.arguments import CommandParser, at_least
from streaming_rwkv.console import log_to_terminal, run_command
from streaming_rwkv.distributed import forget_launcher
from streaming_rwkv.extras import TRAIN, exit_if_missing
from streaming_rwkv.inference.generation_checks import check_max_tokens, check_prompt, check_seed
from streaming_rwkv.location import checked_local, checked_location
from streaming_rwkv.model.marked_files import check_exists
from streaming_rwkv.processes import without_garbage_collection
from streaming_rwkv.shards import SPLITS, check_is_finished

_CHECKPOINT = "a .pth, a Hugging Face folder, a training run or checkpoint, also on s3://"
_DEVICE = "cpu, cuda, cuda:1, … (default: cuda if there is a GPU, otherwise cpu)"
_OUT = "NAME.pth, NAME.gguf, or a folder for Hugging Face's format"
DTYPES = ("bfloat16", "float16", "float32")
LAYOUTS = ("fla", "transformers")
SCHEMES = ("equal", "linear", "1-sqrt")


def generate_parser(program: str) -> CommandParser:
    """Return the parser of the command that generates text."""
    parser = CommandParser(
        prog=program,
        description="Continue a text with a trained model.",
        examples=[
            '{prog} runs/mine "def "',
            '{prog} RWKV-x070-World-0.1B.pth "Once upon a time" --tokenizer rwkv-world --max-tokens 100 --seed 1',
            '{prog} s3://bucket/runs/stage2 "import" --temperature 0',
        ],
    )
    parser.add_argument("checkpoint", help=_CHECKPOINT)
    parser.add_argument("prompt", nargs="?", default="", help="beginning of the text (default: empty)")
    parser.add_argument("--tokenizer", help="default: the tokenizer stored with the checkpoint")
    parser.add_argument("--max-tokens", type=int, default=256, help="largest number of tokens to generate")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=0.9, help="probability mass to sample from")
    parser.add_argument("--seed", type=int, help="random seed: the same seed repeats a text (default: random)")
    parser.add_argument("--device", help=_DEVICE)
    return parser


def generate(arguments: Sequence[str] | None = None, *, program: str = "python -m streaming_rwkv.generate") -> int:
    """Run the command that generates text, and return its exit status."""
    options = generate_parser(program).parse_args(arguments)

    def run() -> int:
        check_prompt(options.prompt)
        check_seed(options.seed, name="--seed")
        check_max_tokens(options.max_tokens, name="--max-tokens")
        check_exists(options.checkpoint)
        _start()
        with without_garbage_collection():
            from streaming_rwkv.inference.generate import run

        return run(options)

    return run_command(run)


def evaluate_parser(program: str) -> CommandParser:
    """Return the parser of the command that measures a checkpoint."""
    parser = CommandParser(
        prog=program,
        description="Measure a checkpoint's loss on a data set, or its scores on tasks.",
        examples=[
            "{prog} runs/stage2 /data/stage2",
            "{prog} model.pth s3://bucket/stage2 --packs-per-stream 20 --json",
            "{prog} runs/stage2 --tasks lambada_openai,piqa --task-folder tasks --limit 500",
        ],
    )
    parser.add_argument("checkpoint", help=_CHECKPOINT)
    parser.add_argument("data", nargs="?", help="a data set that prep built: a folder, or s3://bucket/prefix")
    tasks = parser.add_argument_group("standard tasks, instead of or beside a data set (extra: tasks)")
    tasks.add_argument("--tasks", metavar="NAMES", help="names of lm-evaluation-harness, such as lambada_openai,piqa")
    tasks.add_argument("--task-folder", metavar="DIR", help="folder with task YAMLs of your own")
    tasks.add_argument("--limit", type=at_least(1), metavar="N", help="only the first N documents of each task")
    tasks.add_argument(
        "--shots", type=at_least(0), metavar="N", help="examples before each question (default: the task's)"
    )
    tasks.add_argument("--tokenizer", help="for tasks; default: the tokenizer stored with the checkpoint")
    parser.add_argument("--split", choices=SPLITS, default="validation", help="the split to evaluate")
    parser.add_argument(
        "--packs-per-stream", type=at_least(1), metavar="N", help="evaluate only the first N packs of each stream"
    )
    parser.add_argument("--cache", help="folder for downloaded and decompressed shards (default: a temporary one)")
    parser.add_argument("--device", help=_DEVICE)
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON, with the names that runs log")
    return parser


def evaluate(arguments: Sequence[str] | None = None, *, program: str = "python -m streaming_rwkv.evaluate") -> int:
    """Run the command that measures a checkpoint, and return its exit status."""
    parser = evaluate_parser(program)
    options = parser.parse_args(arguments)
    if options.data is None and options.tasks is None:
        parser.error("give a data set, or --tasks")
    for_tasks = [name for name in ("task_folder", "limit", "shots", "tokenizer") if getattr(options, name) is not None]
    if for_tasks and options.tasks is None:
        parser.error(f"--{for_tasks[0].replace('_', '-')} is for tasks; name them with --tasks")

    def run() -> int:
        check_exists(options.checkpoint)
        if options.data is not None:
            check_is_finished(checked_location(options.data), setting="data")
        if options.tasks is not None:
            exit_if_missing("lm_eval", extra="tasks")
        _start()
        with without_garbage_collection():
            from streaming_rwkv.inference.evaluate import run

        return run(options)

    return run_command(run)


def export_parser(program: str) -> CommandParser:
    """Return the parser of the command that writes weights for other programs."""
    parser = CommandParser(
        prog=program,
        description="Write a checkpoint's weights for other programs: NAME.pth in BlinkDL's format (rwkv, RWKV-Runner, "
        "his\ntrainers), NAME.gguf for llama.cpp, or a Hugging Face folder with the tokenizer.",
        examples=[
            "{prog} runs/stage2 model.pth",
            "{prog} runs/stage2 model-hf --dtype float32",
            "{prog} runs/stage2 model-hf --self-contained",
            "{prog} runs/stage2 model.gguf",
        ],
    )
    parser.add_argument("checkpoint", help=_CHECKPOINT)
    parser.add_argument("out", help=_OUT)
    parser.add_argument(
        "--layout", choices=LAYOUTS, default="fla",
        help="names of a folder's weights: those of fla, which llama.cpp, vLLM and SGLang read too, or those of "
        "transformers' own RWKV-7",
    )  # fmt: skip
    parser.add_argument(
        "--self-contained", action="store_true",
        help="add the model's code to a folder: transformers with trust_remote_code=True needs no fla",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="type of the written weights")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--tokenizer", help="for a folder; default: the tokenizer stored with the checkpoint, if any")
    return parser


def export(arguments: Sequence[str] | None = None, *, program: str = "python -m streaming_rwkv.export") -> int:
    """Run the command that writes weights for other programs, and return its exit status."""
    parser = export_parser(program)
    options = parser.parse_args(arguments)
    if options.self_contained and options.out.endswith((".pth", ".gguf")):
        parser.error(f"--self-contained: for a Hugging Face folder, found {options.out!r}; name a folder")
    if options.self_contained and options.layout != "fla":
        parser.error("--self-contained: transformers has code for its own layout; leave --layout out")

    def run() -> int:
        checked_local(options.out, remedy="give a local path, and copy the export from there")
        check_exists(options.checkpoint)
        _start()
        with without_garbage_collection():
            from streaming_rwkv.inference.export import run

        return run(options)

    return run_command(run)


def average_parser(program: str) -> CommandParser:
    """Return the parser of the command that averages checkpoints."""
    parser = CommandParser(
        prog=program,
        description="Average the weights of a run's newest checkpoints.",
        examples=["{prog} runs/stage2 model.pth", "{prog} s3://bucket/runs/stage2 model-hf --last 4 --weights 1-sqrt"],
    )
    parser.add_argument("run", help="a training run's save folder, or its save_remote on s3://")
    parser.add_argument("out", help=_OUT)
    parser.add_argument("--last", type=at_least(1), default=8, metavar="N", help="number of checkpoints")
    parser.add_argument(
        "--weights", choices=SCHEMES, default="equal",
        help="equal: as a linear decay of the learning rate; 1-sqrt: as a decay by 1 - √(progress), the oldest weighs "
        "most; linear: the newest weighs most",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="type of the written weights")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    return parser


def average(arguments: Sequence[str] | None = None, *, program: str = "python -m streaming_rwkv.average") -> int:
    """Run the command that averages checkpoints, and return its exit status."""
    parser = average_parser(program)
    options = parser.parse_intermixed_args(arguments)

    def run() -> int:
        checked_local(options.out, remedy="give a local path, and copy the export from there")
        check_exists(options.run)
        _start()
        with without_garbage_collection():
            from streaming_rwkv.inference.average import run

        return run(options)

    return run_command(run)


def _start() -> None:
    """Do what comes before the import of torch."""
    exit_if_missing(*TRAIN, extra="train")
    forget_launcher()
    log_to_terminal(logging.WARNING)
    print("loading torch and the checkpoint …", file=sys.stderr, flush=True)
