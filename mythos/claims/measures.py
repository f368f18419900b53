"""Measurements of a claim: of a trained run, or of the model code itself (`once`). Results are plain JSON values."""

import itertools
import re
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError

from mythos.checkpoints.stored_checkpoint import complete_checkpoints
from mythos.checkpoints.stored_model import OpenedModel, open_model
from mythos.config.presets import PRESETS, preset_config
from mythos.data.facts import Split
from mythos.data.tasks import task_set
from mythos.distributed.ranks import choose_device
from mythos.errors import MythosError
from mythos.evaluation.depth_sweep import adaptive_losses, batches_of, depth_sweep, sweep_rules
from mythos.evaluation.reasoning import accuracy_map
from mythos.evaluation.text import as_in_training, validation_data
from mythos.evaluation.validation import right_rows
from mythos.files.storage import step_of
from mythos.model import IGNORE_INDEX
from mythos.model.attention.base import attention_class
from mythos.model.cache import DecodeCache, cache_bytes_per_token
from mythos.model.config import ModelConfig
from mythos.model.halting import default_threshold, halting_rule, usable_rules
from mythos.model.layers import autocast_to
from mythos.model.rdt import DepthReadout, RecurrentDepthTransformer
from mythos.section import MOST_LOOPS

Measure = Callable[..., dict[str, Any]]
SPLITS: tuple[Split, ...] = ("train", "in", "out")


def measure_run(run_dir: Path, measures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Take measurements of a run's newest checkpoint, by kind. Raises MythosError for an unknown kind."""
    if not measures:
        return {}
    opened = open_model(run_dir, choose_device("auto"))
    return {kind: chosen(OF_A_RUN, kind)(opened, **options) for kind, options in measures.items()}


def measure_once(measures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Take measurements that need no run, by kind. Raises MythosError for an unknown kind."""
    return {kind: chosen(ONCE, kind)(**options) for kind, options in measures.items()}


def check_measures(measures: dict[str, dict[str, Any]], once: dict[str, dict[str, Any]]) -> None:
    """Check the measurements of a claim before its runs are trained.

    Raises MythosError for an unknown kind, and for options that it does not take.
    """
    for kinds, asked in ((OF_A_RUN, measures), (ONCE, once)):
        model = [None] if kinds is OF_A_RUN else []  # stands for the argument `opened`
        for kind, options in asked.items():
            function = chosen(kinds, kind)
            hints = get_type_hints(function)
            try:
                signature(function).bind(*model, **options)
                for name, value in options.items():
                    TypeAdapter(hints[name]).validate_python(value, strict=True)
                    if not _positive(value):
                        raise ValueError(f"{name}: allowed: numbers above 0, at most {MOST_LOOPS:,}, no empty list")
            except (TypeError, ValueError) as error:
                reason = f"{name}: {error.errors()[0]['msg']}" if isinstance(error, ValidationError) else str(error)
                raise MythosError(f"measure: {kind}: {reason}") from error


def _positive(value: Any) -> bool:
    """Whether the numbers in an option are above 0 and sensible, and its lists have entries.

    In a mapping, of halting rules, an empty list stands for the default threshold.
    """
    if isinstance(value, dict):
        return all(_positive(part) for parts in value.values() for part in parts)
    if isinstance(value, list):
        return bool(value) and all(map(_positive, value))
    return not isinstance(value, int | float) or isinstance(value, bool) or 0 < value <= MOST_LOOPS


def chosen(kinds: dict[str, Measure], kind: str) -> Measure:
    """The function of a measurement. Raises MythosError if there is none of that name."""
    if kind not in kinds:
        raise MythosError(f"measure: got {kind}; allowed: {', '.join(kinds)}")
    return kinds[kind]


def sweep(
    opened: OpenedModel,
    loops: list[int],
    rules: dict[str, list[float]] | None = None,
    most: list[int] | None = None,
    sequences: int | None = None,
    around: bool = False,
) -> dict[str, Any]:
    """Loss after given numbers of loops, and with halting rules.

    Args:
        opened: the model.
        loops: numbers of loops; of a fixed-depth model only one loop is measured.
        rules: thresholds by rule, [] for the default one; rules that the model does not support are left out.
        most: limits of the loops of a halting rule (default: the training mean).
        sequences: validation sequences (default: as many as in training).
        around: [] in `rules` stands for several thresholds around the default one, as in `mythos sweep`.
    """
    model, device = opened.model, opened.model.head_weight.device
    dtype, micro_batch = as_in_training(opened, device, None, None)
    fixed = model.config.injection == "none"
    supported = () if fixed else usable_rules(model)
    points: list[tuple[str, float]] = []
    for rule, thresholds in (rules or {}).items():
        if rule in supported:
            default = sweep_rules(model, [rule]) if around else [(rule, default_threshold(rule))]
            points += [(rule, threshold) for threshold in thresholds] or default
    data = validation_data(opened, None, sequences)
    mean = 1 if fixed else opened.mean_loops
    taken: dict[str, Any] = {"loops": [], "halting": []}
    for limit in [mean] if fixed or not points else most or [mean]:
        measured = depth_sweep(
            model,
            data,
            depths=[1] if fixed else loops if not taken["loops"] else [1],
            mean_loops=mean,
            rules=points,
            most=limit,
            micro_batch=micro_batch,
            autocast=autocast_to(dtype, device),
            progress=False,
        )
        if not taken["loops"]:
            names = ("loops", "loss", "state_norm", "state_delta", "load_max_over_mean", "expert_overlap")
            taken["loops"] = [{name: getattr(one, name) for name in names} for one in measured.loops]
        taken["halting"] += [
            {"most": limit, **{name: getattr(point, name) for name in ("rule", "threshold", "loss", "loops")}}
            for point in measured.halting
        ]
    return taken


def reasoning(opened: OpenedModel, difficulties: list[int], loops: list[int], sequences: int) -> dict[str, Any]:
    """Accuracy by difficulty and loops on the run's task: rows are difficulties, columns loops."""
    if opened.run is None or opened.run.data.kind != "reasoning":
        raise MythosError(f"{opened.source}: accuracy is measured of runs on data.kind reasoning")
    task = opened.run.data.task
    accuracy = accuracy_map(
        opened.model,
        task,
        name="claim",
        step=opened.step,
        difficulties=difficulties,
        loops=[1] if opened.model.config.injection == "none" else loops,
        sequences=sequences,
        length=opened.run.data.sequence_length,
    )
    return {"difficulties": accuracy.difficulties, "loops": accuracy.loops, "accuracy": accuracy.accuracy}


def facts(opened: OpenedModel, loops: list[int], sequences: int) -> dict[str, Any]:
    """Accuracy on composed questions of a graph of facts, of every checkpoint that the run has kept.

    `train`, `in` and `out` (`mythos.data.facts.Split`): one row per checkpoint, one column per number of loops; the
    first loop count only for a fixed-depth model. Questions are those of the largest difficulty, one in a sequence.
    """
    if opened.run is None or opened.run.data.task.name != "facts":
        raise MythosError(f"{opened.source}: this is measured of runs on data.task.name facts")
    task = opened.run.data.task.model_copy(update={"queries": 1})
    device, hardest, splits = opened.model.head_weight.device, task.difficulty[1], SPLITS
    depths = loops[:1] if opened.model.config.injection == "none" else loops
    taken: dict[str, Any] = {"loops": depths, "steps": [], **{split: [] for split in splits}}
    for checkpoint in complete_checkpoints(Path(opened.source).parent):
        model = open_model(checkpoint, device).model
        taken["steps"].append(step_of(checkpoint))
        for split in splits:
            data = task_set(task, [hardest], sequences, task.length(hardest), "claim", split)
            targets = data.targets.to(device)
            readouts = model.read_depths(data.ids.to(device), targets, depths, judged=True)
            taken[split].append([accuracy_of(readout, targets) for readout in readouts])
    return taken


def frontier(opened: OpenedModel, loops: list[int], sequences: int) -> dict[str, Any]:
    """How well a linear probe of the state after t loops finds the nodes t edges below the root of the task `trees`.

    The state is that at the last token, which asks about a root. The probe is a ridge regression from it to membership
    of every node, fitted to half of the sequences; `recall` is the share of the nodes of level t among the probe's
    highest scores, as many as there are such nodes, on the other half. `depth_first` is the recall of a state that
    holds one of the nodes and guesses the others among the level's nodes of both trees, `chance` that of a guess.
    """
    if opened.run is None or opened.run.data.task.name != "trees":
        raise MythosError(f"{opened.source}: this is measured of runs on data.task.name trees")
    task, model = opened.run.data.task, opened.model
    data = task_set(task, [task.levels], sequences, task.length(task.levels), "claim")
    states: list[list[torch.Tensor]] = [[] for _ in range(max(loops))]
    device = model.head_weight.device
    for ids, targets in zip(data.ids.split(256), data.targets.split(256), strict=True):
        model.read_depths(
            ids.to(device),
            targets.to(device),
            [max(loops)],
            observe=lambda after: states[after.loop - 1].append(after.state[:, -1].cpu().double()),
        )
    taken: dict[str, Any] = {"loops": loops, "recall": [], "depth_first": [], "chance": []}
    for count in loops:
        members_BN = level_members(data.ids, task.nodes, count)
        taken["recall"].append(probe_recall(torch.cat(states[count - 1]), members_BN))
        size = task.branches**count
        taken["chance"].append(0.5)
        taken["depth_first"].append((1 + (size - 1) * (size - 1) / (2 * size - 1)) / size)
    return taken


def level_members(ids_BL: torch.Tensor, nodes: int, level: int) -> torch.Tensor:
    """Whether each node is that many edges below the last token: (B, nodes) float64, by a search in the text."""
    members = torch.zeros(len(ids_BL), nodes, dtype=torch.float64)
    for row, ids in enumerate(ids_BL.tolist()):
        pairs = [divmod(token - 1 - nodes, nodes) for token in ids[: nodes - 2]]
        here = {ids[-1] - 1}
        for _ in range(level):
            here = {child for parent, child in pairs if parent in here}
        members[row, list(here)] = 1
    return members


def probe_recall(state_BD: torch.Tensor, members_BN: torch.Tensor, ridge: float = 1.0) -> float:
    """Mean recall of the members among the highest scores of a ridge regression, on the second half of the rows."""
    half, features = len(state_BD) // 2, torch.cat([state_BD, torch.ones(len(state_BD), 1).double()], dim=1)
    train, test = features[:half], features[half:]
    gram = train.T @ train + ridge * torch.eye(train.shape[1], dtype=torch.float64)
    scores = test @ torch.linalg.solve(gram, train.T @ members_BN[:half])
    size = int(members_BN[0].sum())
    return float(members_BN[half:].gather(1, scores.topk(size, dim=1).indices).mean())


def accuracy_of(readout: DepthReadout, targets: torch.Tensor) -> float:
    """Share of sequences with every answer right."""
    assert readout.right is not None, "judged=True was requested"
    return float(right_rows(readout.right, targets).double().mean())


def spent(
    opened: OpenedModel, rules: list[str], classes: int = 8, sentences: int = 4, sequences: int | None = None
) -> dict[str, Any]:
    """Where halting rules at their default thresholds spend loops, on the validation set.

    By rule, those that the model lacks left out:

    - `frequency`: means over classes of as many positions each, by how often the predicted token occurs in the set,
      most frequent first (:func:`in_classes`);
    - `place`: the same by place in the sequence, first positions first;
    - `sentences`: the first whole sentences of the set, which are the same for every rule, as [piece of text, loops
      after which it was predicted].
    """
    model, device = opened.model, opened.model.head_weight.device
    supported = () if model.config.injection == "none" else usable_rules(model)
    dtype, micro_batch = as_in_training(opened, device, None, None)
    data, decode = validation_data(opened, None, sequences), opened.require_tokenizer().decode
    taken = {}
    for rule in (rule for rule in rules if rule in supported):
        batches = []
        with autocast_to(dtype, device):
            for rows in batches_of(data, micro_batch, device):
                loss, loops = adaptive_losses(
                    model, rows.ids, rows.targets, rows.documents, halting_rule(model, rule), opened.mean_loops
                )
                batches.append([values.cpu() for values in (rows.targets, loops, loss)])
        targets, used, losses = (torch.cat(parts) for parts in zip(*batches, strict=True))
        counted = targets != IGNORE_INDEX
        ids, places = targets[counted], torch.arange(targets.shape[1]).expand_as(targets)[counted]
        taken[rule] = {
            "frequency": in_classes(-torch.bincount(ids)[ids], used[counted], losses[counted], classes),
            "place": in_classes(places, used[counted], losses[counted], classes),
            "sentences": [
                [
                    [decode([token]), loops]
                    for token, loops in zip(targets[row, span].tolist(), used[row, span].tolist(), strict=True)
                ]
                for row, span in whole_sentences(targets, decode, sentences)
            ],
        }
    return taken


def whole_sentences(ids_BS: torch.Tensor, decode: Callable[[list[int]], str], count: int) -> list[tuple[int, slice]]:
    """Row and columns of the first whole sentence of 12 to 32 tokens in each of the first rows that have one.

    A sentence lies between two tokens that end with a full stop. Those with other characters than ASCII letters,
    digits, spaces and ,;'- are left out, for they do not show well in a table.
    """
    found: list[tuple[int, slice]] = []
    for row, ids in enumerate(ids_BS.tolist()):
        pieces = ["" if token == IGNORE_INDEX else decode([token]) for token in ids]
        stops = [column + 1 for column, piece in enumerate(pieces) if piece.endswith(".")]
        for first, last in itertools.pairwise(stops):
            text = "".join(pieces[first:last])
            if 12 <= last - first <= 32 and re.fullmatch(r" [A-Z][A-Za-z0-9 ,;'-]*\.", text):
                found.append((row, slice(first, last)))
                break
        if len(found) == count:
            break
    return found


def in_classes(key_N: torch.Tensor, loops_N: torch.Tensor, losses_N: torch.Tensor, classes: int) -> dict[str, Any]:
    """Mean loops and loss in nats of positions in order of a key, divided into classes of as many positions each."""
    parts = torch.argsort(key_N, stable=True).chunk(classes)
    return {
        "loops": [loops_N[part].double().mean().item() for part in parts],
        "loss": [losses_N[part].double().mean().item() for part in parts],
        "positions": [len(part) for part in parts],
    }


def cache(presets: list[str], tokens: int, beside: list[str] | None = None) -> dict[str, Any]:
    """Bytes of keys and values that one token takes, of latent and other attention: computed, and while decoding.

    `rows` are those of `presets`, `beside` those of further presets, which decide nothing.

    Each preset is taken with its own latent attention (`mla`), with its own heads and shared key and value heads
    (`gqa`), and with a key and value head for each query head (`mha`). `entry` is bytes of a token, layer and loop in
    bfloat16 by the formula that plans use; `computed` those of a token in all layers and loops; `measured` is what a
    cache has allocated after decoding `tokens` tokens, divided by them. The decoded model has the preset's attention,
    layers and loops, and narrow matrices otherwise, on which a cache entry does not depend.
    """
    return {
        "tokens": tokens,
        "rows": [row for name in presets for row in cache_rows(name, tokens)],
        "beside": [row for name in beside or [] for row in cache_rows(name, tokens)],
    }


def cache_rows(name: str, tokens: int) -> Iterator[dict[str, Any]]:
    """The rows of :func:`cache` for a preset."""
    if name not in PRESETS:
        raise MythosError(f"measure: got the preset {name}; `mythos presets` lists all")
    for kind, config in attention_variants(preset_config(name)).items():
        yield {
            "preset": name,
            "attention": kind,
            "loops": config.loops,
            "entry": attention_class(config).entry_width(config) * torch.bfloat16.itemsize,
            "computed": cache_bytes_per_token(config, config.loops, torch.bfloat16),
            "measured": decoded_bytes(config, tokens) // tokens,
        }


def attention_variants(preset: ModelConfig) -> dict[str, ModelConfig]:
    """A preset with latent attention, with its grouped heads, and with all heads."""
    return {
        "mla": preset.model_copy(update={"attention": "mla"}),
        "gqa": preset.model_copy(update={"attention": "gqa"}),
        "mha": preset.model_copy(update={"attention": "gqa", "n_kv_heads": preset.n_heads}),
    }


@torch.no_grad()
def decoded_bytes(config: ModelConfig, tokens: int) -> int:
    """Bytes that a bfloat16 cache has allocated after decoding one row of `tokens` tokens, token by token."""
    narrow: dict[str, Any] = {
        "dim": 64,
        "ffn_dim": 8,
        "expert_dim": 8,
        "shared_expert_dim": 8,
        "n_experts": 2,
        "vocab_size": 128,
        "experts_per_token": 2,
        "lora_rank": 0,
        "q_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "halting": "none",
        "context_length": max(tokens, 8),
    }
    config = config.model_copy(update=narrow)
    model = RecurrentDepthTransformer(config).initialize(0).eval()
    store = DecodeCache(config, 1, loops=config.loops, dtype=torch.bfloat16, block=tokens)
    for token in range(tokens):
        model.extend(torch.tensor([[token]]), store, loops=config.loops)
    return store.bytes


OF_A_RUN: dict[str, Measure] = {
    "sweep": sweep,
    "reasoning": reasoning,
    "facts": facts,
    "frontier": frontier,
    "spent": spent,
}
"""Measurements of a trained model, by the name in a claim's `measure`."""
ONCE: dict[str, Measure] = {"cache": cache}
"""Measurements without a run, by the name in a claim's `once`."""
