"""The sections on exported files: how well each agrees with PyTorch, the precisions side by side, the engines."""

from __future__ import annotations

from typing import Any

from chipdeploy.report.tables import NOTHING, Artifact, bytes_text, markdown_grid, percent_text

NETWORKS = ("dense", "pruned")


def files_section(export: Artifact | None) -> str:
    """Every ONNX file: agreement with torch, accuracy on the validation images where it was taken."""
    if not (export or {}).get("verification"):
        return ""
    assert export is not None
    entries = {"fp32": export, **export.get("precisions", {})}
    lines = [_file_line(entry, name) for entry in entries.values() for name in NETWORKS]
    headers = ("ONNX file", "size", "largest relative error", "allowed", "same class", "batches", "validation")
    kept = [
        f"- `{entry[name]['file']}` keeps in a higher precision: {', '.join(entry[name]['kept_float'])}"
        for entry in entries.values()
        for name in NETWORKS
        if entry[name].get("kept_float")
    ]
    parts = ["## ONNX against torch", markdown_grid(headers, lines)]
    return "\n\n".join([*parts, *(["\n".join(kept)] if kept else [])])


def _file_line(entry: Artifact, name: str) -> tuple[str, ...]:
    file, check = entry[name], entry["verification"].get(name)
    accuracy = file.get("accuracy")
    compared = ("not compared", *[NOTHING] * 3)  # nothing here can run it
    if check:
        compared = (
            f"{check['max_relative_error']:.1e}",
            f"{check['tolerance']:.0e}",
            percent_text(check["top1_agreement"]),
            ", ".join(map(str, check["batches"])),
        )
    return (
        file.get("file", name),
        bytes_text(file["bytes"]) if "bytes" in file else NOTHING,
        *compared,
        f"{percent_text(accuracy['top1'])} of {accuracy['images']}" if accuracy else NOTHING,
    )


def choice_section(export: Artifact | None) -> str:
    """What `--precision best` measured, and took."""
    best: Artifact | None = (export or {}).get("best")
    if not best:
        return ""
    lines = [
        (
            row["precision"],
            percent_text(row["accuracy"]),
            f"{row['drop_points']:+.2f} points" + ("" if row["holds"] else ", too much"),
            f"{row['ratio']:.2f} ({row['ratio_interval'][0]:.2f}-{row['ratio_interval'][1]:.2f})"
            + (f", noisy: {row['noise']}" if row.get("noise") else ""),
        )
        for row in best["table"]
    ]
    headers = ("precision", "validation accuracy", "drop", "time / fp32 (95 %)")
    return f"## Precisions\n\n{markdown_grid(headers, lines)}\n\nTaken: {choice_text(best)}."


def choice_text(best: Artifact) -> str:
    """What was taken, and why."""
    limit = f"loses at most {best['max_drop_points']:g} points and is faster than fp32 for certain"
    why = f"since nothing else {limit}" if best["precision"] == "fp32" else f"the fastest that {limit}"
    return f"{best['precision']} on {best['target']}, {why}"


def engines_section(export: Artifact | None) -> str:
    """The engines, for which GPUs and batches they are, and by what they were built."""
    engines: dict[str, Any] = (export or {}).get("engines", {})
    lines = [
        (
            entry[name]["file"],
            bytes_text(entry[name]["bytes"]),
            entry[name]["gpu_name"] or ", ".join(entry[name]["gpus"]),
            ", ".join(map(str, entry[name]["batches"])),
            f"{entry[name]['runtime']} {entry[name]['runtime_version']}",
        )
        for entry in engines.values()
        for name in NETWORKS
    ]
    if not lines:
        return ""
    return f"## Engines\n\n{markdown_grid(('engine', 'size', 'for', 'batches', 'built by'), lines)}"
