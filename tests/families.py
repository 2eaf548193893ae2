"""The page of families: every causal language model of Transformers, tiny and random, on two ranks beside one.

    python tests/families.py --out configs/models --page docs/models.md [FAMILY ...]

All families run in one world of ranks, which is started once. What is found of a family decides at run time, too:
`dsp_plugin.patches.transformers.verified` reads the results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from compatibility import versions

from dsp_plugin import SequenceParallelConfig, SequenceParallelGroups
from dsp_plugin.patches.transformers import tiny, trials
from dsp_plugin.spawn import spawn
from dsp_plugin.verification.model import Shard, Verdict, compare

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "configs" / "models"
PAGE = ROOT / "docs" / "models.md"
METHOD, SIZE = "ring", 2
# A world that hangs is given up after so many seconds.
TIMEOUT = 3600.0
EMPTY: Mapping[str, Any] = {}
# What the tiny config of a family needs beyond what its names tell.
SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 16, "attn_layer_indices": [1]},
    "granitemoehybrid": {"mamba_d_head": 16, "layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "mamba2": {"head_dim": 16},
    "zamba2": {"mamba_headdim": 16, "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4},
    "dots1": {"n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "xmod": {"default_language": "en_XX"},
}
WINDOWED = "windowed"
FEATURES = {"tokens": trials.FEATURES["tokens"], WINDOWED: "sliding windows where the config can ask for them"} | {
    name: what for name, what in trials.FEATURES.items() if name != "tokens"
}
STATUSES = ("exact", "refused", "not built", "wrong")


def names() -> dict[str, str]:
    """Classes by the model type of their configs."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def survey(tried: Mapping[str, Sequence[str]], settings: Mapping[str, Any] = EMPTY) -> dict[str, dict[str, Verdict]]:
    """The verdicts by family and feature. Every rank of a world of `SIZE` calls this; they agree.

    A family whose plain run is not exact is not tried further.

    Args:
        tried: features by family.
        settings: further ones of the section.
    """
    import torch

    if not torch.cuda.is_available():
        # Transformers takes its kernels where it is installed, on whatever device the tensors are.
        sys.modules["fla"] = None  # type: ignore[assignment]
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    groups = SequenceParallelGroups.build(SequenceParallelConfig(method=METHOD, size=SIZE))
    shard = partial(trials.shard, section={**trials.section_of(METHOD, SIZE), **settings})
    return {family: _tried(family, features, shard, groups) for family, features in tried.items()}


def _tried(family: str, features: Sequence[str], shard: Shard, groups: SequenceParallelGroups) -> dict[str, Verdict]:
    import transformers

    found: dict[str, Verdict] = {}
    try:
        kind = getattr(transformers, names()[family])
        # The mapping also has configs of which a class takes a part.
        config = (kind.config_class or transformers.CONFIG_MAPPING[family])()
        # BERT and its kin attend both ways, unless they are told that they decode.
        settings = SETTINGS.get(family, {}) | ({"is_decoder": True} if hasattr(config, "is_decoder") else {})
        model = tiny.random_model(kind, tiny.shrunk(config, **settings))
        windows = tiny.windows(config)
    except Exception as error:
        return {"tokens": Verdict("not built", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")}
    for feature in features:
        if feature == WINDOWED and not windows:
            continue
        try:
            subject, what = model, feature
            if feature == WINDOWED:
                subject, what = tiny.random_model(kind, tiny.shrunk(config, **settings, **windows)), "tokens"
            prepared = trials.prepared(subject, what)
        except (ValueError, TypeError) as error:
            found[feature] = Verdict("not built", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        found[feature] = compare(prepared, trials.batches(prepared, what), shard, groups)
        if feature == "tokens" and found[feature].status != "exact":
            break
    return found


def run(
    tried: Mapping[str, Sequence[str]], timeout: float = TIMEOUT, settings: Mapping[str, Any] = EMPTY
) -> dict[str, dict[str, Verdict]]:
    """`survey` in a world of its own."""
    first, *others = spawn(survey, SIZE, tried, settings, timeout=timeout)
    assert all(_statuses(other) == _statuses(first) for other in others), "ranks disagree"
    return first


def _statuses(found: Mapping[str, Mapping[str, Verdict]]) -> dict[str, dict[str, str]]:
    return {family: {name: v.status for name, v in verdicts.items()} for family, verdicts in found.items()}


def status_of(verdicts: Mapping[str, Verdict]) -> str:
    """Of a family: wrong if anything is; else that of its plain run."""
    return "wrong" if any(v.status == "wrong" for v in verdicts.values()) else verdicts["tokens"].status


def write(path: Path, found: Mapping[str, Mapping[str, Verdict]], arguments: Sequence[str]) -> None:
    """Writes verdicts, date and versions; into the results of the same versions where only some families were tried."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    if path.exists() and len(found) < len(names()):
        content = json.loads(path.read_text())
        content["families"] |= {family: {**_entry(family, found[family]), "date": today} for family in found}
        content["families"] = dict(sorted(content["families"].items()))
        path.write_text(json.dumps(content, indent=1) + "\n")
        return
    content = {
        "date": today,
        "command": f"python tests/families.py {' '.join(arguments)}",
        "versions": versions(),
        "families": {family: _entry(family, verdicts) for family, verdicts in sorted(found.items())},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def _entry(family: str, verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    return {
        "class": names()[family],
        "status": status_of(verdicts),
        "features": {name: _shown_verdict(verdict) for name, verdict in verdicts.items()},
    }


def _file_name() -> str:
    python = ".".join(platform.python_version_tuple()[:2])
    return f"transformers-{versions()['transformers']}-py{python}.json"


def _shown_verdict(verdict: Verdict) -> dict[str, Any]:
    """What says something, errors to two digits: further ones are rounding's."""
    rounded = {
        name: float(f"{value:.1e}") if isinstance(value, float) else value for name, value in asdict(verdict).items()
    }
    return {name: value for name, value in rounded.items() if value}


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The results of runs."""
    return [json.loads(path.read_text()) for path in sorted(paths)]


def page(runs: Sequence[Mapping[str, Any]]) -> str:
    """The page in Markdown."""
    lines = [
        "# Causal language models of Transformers",
        "",
        "Written by `make matrix`: every family of Transformers' mapping of causal language models is built with a "
        f"tiny random config and trained on {SIZE} ranks (`{METHOD}`, uneven shards) beside one, in fp64.",
        "",
        "- *exact*: losses and every gradient equal those of the unsharded model to 1e-10.",
        "- *refused*: an error that says why, on every rank, before anything is sent.",
        "- *not built*: the tiny model could not be built or run unsharded; nobody knows.",
        "- *-*: nothing to try, or not tried because the plain run is not exact.",
        "",
        *(f"- {name}: {what}" for name, what in FEATURES.items()),
        "",
        'Families that are not exact here are refused unless the section says `"unverified_model": true`: see '
        "[configuration](configuration.md#families-of-transformers).",
    ]
    for run_ in runs:
        found = ", ".join(f"{name} {version}" for name, version in run_["versions"].items() if name != "megatron-core")
        families = run_["families"]
        counts = {status: sum(f["status"] == status for f in families.values()) for status in STATUSES}
        shown = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        lines += ["", f"## {found}", "", f"{run_['date']}: {len(families)} families, {shown}.", ""]
        lines += [f"| family | class | {' | '.join(FEATURES)} |", f"|---|---|{'---|' * len(FEATURES)}"]
        notes: dict[str, int] = {}
        for family, entry in families.items():
            cells = [_shown(entry["features"].get(feature), entry["class"], notes) for feature in FEATURES]
            lines.append(f"| {family} | {entry['class']} | {' | '.join(cells)} |")
        lines += ["", *(f"[{number}] {note}  " for note, number in notes.items())]
    return "\n".join(lines).rstrip() + "\n"


def _shown(verdict: Mapping[str, Any] | None, kind: str, notes: dict[str, int]) -> str:
    if verdict is None:
        return "-"
    why = [verdict["why"].replace(kind, "it").replace("|", "\\|")] if verdict.get("why") else []
    if verdict.get("evaluated"):
        why.append("Compared in evaluation mode: in training mode the model draws random numbers.")
    status = f"**{verdict['status']}**" if verdict["status"] == "wrong" else verdict["status"]
    return " ".join([status, *(f"[{notes.setdefault(text, len(notes) + 1)}]" for text in why)])


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Exit status 1 where anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="those of the mapping; all if left out")
    parser.add_argument("--out", type=Path, help="folder for the results, named by the versions")
    parser.add_argument("--page", type=Path, help="write the page of all results in the folder of --out there")
    args = parser.parse_args(argv)
    found = run({family: tuple(FEATURES) for family in args.families or names()})
    for family, verdicts in found.items():
        told = {
            name: v.status if v.status == "exact" else f"{v.status}: {v.why} {v.first}" for name, v in verdicts.items()
        }
        print(family, status_of(verdicts), told, file=sys.stderr)
    if args.out is not None:
        write(args.out / _file_name(), found, sys.argv[1:] if argv is None else argv)
    if args.page is not None:
        args.page.write_text(page(read(list(RESULTS.glob("*.json")))))
    sys.exit(any(status_of(verdicts) == "wrong" for verdicts in found.values()))


if __name__ == "__main__":
    main()
