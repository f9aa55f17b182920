"""The build: from a recipe to a finished data set.

    find inputs ─▶ plan units ─▶ tokenize units ─▶ deduplicate ranges of hashes ─▶ pack windows ─▶ assemble ─▶ publish

Each stage is a list of tasks that depends on the input alone. The engine runs them in any order, and each task is
either finished or absent. The manifest is written last.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from prep.config import PrepConfig
from prep.dataset.finished import find_local_manifest, find_manifest
from prep.dataset.names import REJECTED_NAME, STATISTICS_NAME
from prep.dataset.upload import Transfers, check_free, publish
from prep.execution.context import BuildContext
from prep.execution.engine import start
from prep.execution.observer import Observer
from prep.execution.resume import BuildState, build_state, check_resumable
from prep.execution.steps import run_step
from prep.execution.task_store import explained_write_errors, locked
from prep.execution.tasks import Run
from prep.execution.work_folder import (
    check_folder,
    clear_work,
    discard_unaudited,
    has_finished_work,
    keep_units_only,
    save_tokenizer,
    switch_to_reference,
    uses_reference,
)
from prep.inputs.decontamination import read_evaluation
from prep.inputs.text_keys import check_text_keys
from prep.inputs.units import find_sources, plan_units
from prep.stages.assembly import ShardUploads, assemble, publish_locally
from prep.stages.audit import AuditError, report_handler, warn_of_reference
from prep.stages.deduplication import deduplicate
from prep.stages.input_hashes import hash_inputs
from prep.stages.packing import pack_window, plan_windows
from prep.stages.records import PackedWindow, UnitRecord
from prep.stages.tokenization import tokenize
from streaming_rwkv.config import UserError
from streaming_rwkv.location import is_remote
from streaming_rwkv.shards import Manifest
from streaming_rwkv.storage import Store, open_store
from streaming_rwkv.tokenizer import Tokenizer, load_tokenizer
from streaming_rwkv.version import PROGRAM

_PUBLISHED = (STATISTICS_NAME, REJECTED_NAME)


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """A finished data set, and whether an earlier start had finished it."""

    manifest: Manifest
    was_finished: bool


def build(
    config: PrepConfig, *, observer: Observer | None = None, fork: bool = False, accept_changes: bool = False
) -> BuildResult:
    """Build the data set that `config` describes, or resume a build that was interrupted.

        build(PrepConfig(out="shards", tokenizer="rwkv-world", sources={"web": SourceConfig(paths=["web.jsonl"])}))

    Args:
        observer: receives the progress.
        fork: start workers by fork, not by spawn; see `prep.execution.engine.start` for when that is safe.
        accept_changes: continue an unfinished build whose input was changed, and repeat the work on what was changed.
    Raises:
        UserError: anything that its text says how to fix; finished work is kept.
    """
    if not isinstance(config, PrepConfig):
        raise UserError(f"build: found {config!r}, expected a PrepConfig; a file is built by `{PROGRAM} prepare FILE`")
    observer = observer or Observer()
    check_folder(config)
    files = find_sources(config.sources)
    observer.inputs(files, config)
    tokenizer = load_tokenizer(config.tokenizer, bos_token=config.bos_token, eos_token=config.eos_token)
    state = build_state(config, tokenizer.record(), files)
    with contextlib.closing(open_store(config.out)) if is_remote(config.out) else nullcontext() as store:
        manifest, _ = _find_earlier(state, store, accept_changes=accept_changes)
        if manifest is not None:
            if has_finished_work(config.work_folder):
                with locked(config.work_folder):
                    clear_work(config, published=_PUBLISHED)
            return BuildResult(manifest=manifest, was_finished=True)
        check_text_keys(config.sources, files)
        context = BuildContext(
            config=config,
            recipe=state.values["config"],
            units=plan_units(config.sources, unit_bytes=config.unit_bytes, files=files),
            vocab_size=tokenizer.vocab_size,
            loaded_tokenizer=tokenizer,
            evaluation=read_evaluation(config.decontaminate) if config.decontaminate else None,
            by_reference=uses_reference(config.work_folder),
        )
        with explained_write_errors(context.folder), locked(context.work_folder):
            # Another build may have worked here until this one held the lock.
            manifest, changes = _find_earlier(state, store, accept_changes=accept_changes)
            if manifest is not None:
                return BuildResult(manifest=manifest, was_finished=True)
            if changes:
                context = keep_units_only(context, changes)
            state.save()
            if store is not None:
                check_free(store)
                store.close()  # before workers are forked: they would inherit its connections
            save_tokenizer(tokenizer, context)
            discard_unaudited(context)
            manifest = _run_audited(context, tokenizer, observer, store, state, fork=fork)
            if store is None:
                publish_locally(context, manifest)
            clear_work(config, published=_PUBLISHED)
    return BuildResult(manifest=manifest, was_finished=False)


def _find_earlier(state: BuildState, store: Store | None, *, accept_changes: bool) -> tuple[Manifest | None, list[str]]:
    """Return the manifest if this build has finished before, and otherwise the changes since it was started."""
    manifest = find_local_manifest(state.config.folder) if store is None else find_manifest(store)
    return manifest, check_resumable(state, manifest=manifest, accept_changes=accept_changes)


def _run_audited(
    context: BuildContext,
    tokenizer: Tokenizer,
    observer: Observer,
    store: Store | None,
    state: BuildState,
    *,
    fork: bool,
) -> Manifest:
    """Run all stages, and if the fast tokenizer is found to differ from its reference, all again with the reference."""
    try:
        return _run_stages(context, tokenizer, observer, store, state, fork=fork)
    except AuditError as error:
        if context.by_reference:
            raise
        warn_of_reference(error)
        context = switch_to_reference(context, str(error))
        # Without fork: the reference has encoded texts in this process, so it has threads.
        return _run_stages(context, tokenizer, observer, store, state, fork=False)


def _run_stages(
    context: BuildContext,
    tokenizer: Tokenizer,
    observer: Observer,
    store: Store | None,
    state: BuildState,
    *,
    fork: bool,
) -> Manifest:
    """Run all stages; a remote data set is then published.

    Raises:
        AuditError: the ids are not those of the reference; nothing was published.
    """
    with (
        start(context, on_report=report_handler(observer, tokenizer), fork=fork) as run,
        Transfers(store) if store is not None else nullcontext() as transfers,
    ):
        if context.config.audit_bytes:
            tokenizer.encode_reference([])  # loads it while the workers load theirs
        units = tokenize(context, run, observer)
        deduplicate(context, units, run, observer)
        packed = _pack(context, units, run, observer, transfers)
        state.save(contents=hash_inputs(state.files, run, observer))
        manifest = assemble(context, tokenizer, units, packed, in_place=transfers is None)
        if transfers is not None:
            transfers.wait(observer)
            publish(context.folder, manifest, transfers)
    return manifest


def _pack(
    context: BuildContext, units: Sequence[UnitRecord], run: Run, observer: Observer, transfers: Transfers | None
) -> list[PackedWindow]:
    windows = plan_windows(context, units)
    sizes = [(window.source, window.tokens) for window in windows]
    uploads = ShardUploads(transfers, windows, work_folder=context.work_folder) if transfers is not None else None
    records = run_step("packing", run, pack_window, windows, sizes, observer, uploads.add if uploads else None)
    return list(zip(windows, records, strict=True))
