"""The graph engine's fusions: the ONNX nodes of each operator of an OM, and the passes that created it.

Source: hicann/ge, `graph_pass_util.cc` (attributes `_datadump_original_op_names` and `pass_name`) and `pb2json.cc`
(names are C-escaped); `fusion_result.json` as atc writes it into its working folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List, Mapping

from clipval.errors import InputError

ORIGINS, PASSES = "_datadump_original_op_names", "pass_name"


def names(file: Path) -> Dict[str, List[str]]:
    """ONNX nodes of each operator of an OM, from the output of `atc --mode=1 --om=... --json=...`.

    Raises:
        InputError: the file is something else.
    """
    return {one["name"]: _listed(one, ORIGINS) for one in _operators(file)}


def passes(file: Path) -> Dict[str, List[str]]:
    """Fusion passes that created each operator of an OM, from the same file; only operators created by a pass.

    Raises:
        InputError: the file is something else.
    """
    found = {one["name"]: list(dict.fromkeys(_listed(one, PASSES))) for one in _operators(file)}
    return {name: made for name, made in found.items() if made}


def _operators(file: Path) -> List[Dict[str, Any]]:
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
        operators = [one for part in whole["graph"] for one in part["op"]]
        if not all(isinstance(one["name"], str) for one in operators):
            raise TypeError("an operator without a name")
        return operators
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"OM as JSON {file}: cannot be read ({error}); make it with atc --mode=1 --om --json"
        ) from error


def _listed(operator: Mapping[str, Any], key: str) -> List[str]:
    """A list attribute of an operator, unescaped."""
    for one in operator.get("attr", ()):
        if one.get("key") == key:
            found = one.get("value", {}).get("list", {}).get("s", [])
            return [text.encode("latin-1", "replace").decode("unicode_escape") for text in found]
    return []


def applied(file: Path) -> Dict[str, int]:
    """Passes of `fusion_result.json` that were applied, sorted, with how often.

    Raises:
        InputError: the file is not JSON.
    """
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"fusion result {file}: cannot be read ({error})") from error
    found: Dict[str, int] = {}
    for part in whole if isinstance(whole, list) else [whole]:
        for kind in ("graph_fusion", "ub_fusion"):
            for name, times in (part.get(kind) or {}).items():
                count = int(times.get("effect_times", 0) or 0)
                if count > 0:
                    found[name] = found.get(name, 0) + count
    return dict(sorted(found.items()))


def advice(operator: str, made: Mapping[str, List[str]], counts: Mapping[str, int]) -> List[str]:
    """Which fusions to switch off for an operator: those that created it, else all applied ones.

    Args:
        made: see `passes`; counts: see `applied`. Either may be empty.
    """
    how = "--fusion_switch_file in --atc-flags"
    own = made.get(operator, [])
    if own:
        said = ", ".join(f"{one} (applied {counts[one]} times)" if one in counts else one for one in own)
        return [f"switch off the fusion that made {operator}: {said} ({how})"]
    if made:  # the OM records passes, and none created this operator
        return []
    return [f"switch off an applied fusion: {', '.join(counts)} ({how})"] if counts else []
