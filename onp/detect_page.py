"""The page of `onp.detect`: one HTML file that needs no network, with its pictures inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from torch import Tensor

from baselines_rnp.label_detection import Evidence
from baselines_rnp.patch_recovery import Source
from onp.data import DefenceData
from onp.drawing import draw_graph
from onp.errors import ModelError
from onp.graph import build_graph, to_networkx
from onp.images import picture_of
from onp.inputs import Inputs
from onp.logits import logits_of
from onp.samples import Samples
from onp.trigger_recovery import Patch
from onp.units import index_units
from onp.verdict import by_suspicion, headline, percent, units_of

EXAMPLES = 6
"""clean images that the recovered trigger is shown on"""
SAMPLES = 24
"""ranked samples with a picture"""


def render(
    record: dict[str, Any],
    inputs: Inputs,
    data: DefenceData,
    evidence: Evidence,
    patches: Mapping[Source, Patch],
    samples: Samples | None,
) -> str:
    """The page as text, for a `record` of `onp.verdict.make_record`."""
    template = resources.files("onp").joinpath("templates", "detect.html").read_text(encoding="utf-8")
    names = [row["name"] for row in record["classes"]]
    rows = by_suspicion(record)
    units = units_of(record)
    largest = {key: max((row[key] for row in rows if row[key] is not None), default=1.0) for key in units}
    found = record["verdict"] == "evidence"
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template).render(
        record=record,
        headline=headline(record),
        percent=percent,
        rows=rows,
        units=units,
        largest=largest,
        suspect=names[record["suspect"]] if record["suspect"] is not None else None,
        examples=_examples(inputs, data, evidence, names),
        patches=[
            {
                **record["recovered"][source],
                "source": source,
                "mask": _picture(patch.mask),
                "pattern": _picture(patch.pattern * patch.mask),
            }
            for source, patch in patches.items()
        ],
        graph=_graph(inputs, data, evidence, record["suspicious_units"]) if found else None,
        samples=_thumbnails(record, samples),
    )  # fmt: skip


def _examples(inputs: Inputs, data: DefenceData, evidence: Evidence, names: list[str]) -> list[dict[str, Any]]:
    """Clean images of several other classes, without and with the recovered trigger, and what the network says."""
    others = [number for number, label in enumerate(data.labels.tolist()) if label != evidence.suspect][:EXAMPLES]
    clean = data.images[others]
    triggered = evidence.trigger(clean)
    said = [logits_of(inputs.model, data.normalise(images)).softmax(1).max(1) for images in (clean, triggered)]
    return [
        {
            "clean": _picture(clean[i]),
            "triggered": _picture(triggered[i]),
            "before": names[int(said[0].indices[i])],
            "after": names[int(said[1].indices[i])],
            "sure": float(said[1].values[i]),
        }
        for i in range(len(clean))
    ]


def _thumbnails(record: dict[str, Any], samples: Samples | None) -> list[dict[str, Any]]:
    if samples is None:
        return []
    numbers = {str(path): number for number, path in enumerate(samples.paths)}
    ranked = record["samples"][:SAMPLES]
    return [{**sample, "picture": _picture(samples.images[numbers[sample["path"]]])} for sample in ranked]


def _graph(inputs: Inputs, data: DefenceData, evidence: Evidence, units: list[str]) -> Markup | None:
    """The unit graph with the suspicious units ringed; None where the network cannot be traced."""
    try:
        index = index_units(inputs.model, data.input_shape)
        graph = to_networkx(build_graph(index, inputs.model, data.inputs, evidence.unlearned, {}), index)
    except ModelError:
        return None
    file = io.BytesIO()
    draw_graph(graph, file, {unit for unit in graph if graph.nodes[unit]["name"] in set(units)}, meaning="suspicious")
    return _uri(file.getvalue())


def _picture(image: Tensor) -> Markup:
    """A data URI of an image of shape (channels, height, width) in [0, 1]."""
    file = io.BytesIO()
    picture_of(image).save(file, "PNG")
    return _uri(file.getvalue())


def _uri(png: bytes) -> Markup:
    return Markup("data:image/png;base64,") + base64.b64encode(png).decode()
