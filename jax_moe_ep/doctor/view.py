"""The report for people, as rich tables."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jax_moe_ep.doctor.diagnosis import Report
from jax_moe_ep.doctor.facts import Matrix

# Text, not str, in every cell from outside: rich would take "jax[cuda13]" for markup.


def render(report: Report) -> RenderableType:
    """The report for people, as rich tables."""
    parts: list[RenderableType] = [
        _facts("Versions", report.host.versions),
        _device_table(report),
        _facts("CUDA implementation", _cuda_facts(report)),
    ]
    if report.extension.peer_access:
        parts.append(_peer_table(report.extension.peer_access))
    auto = f'implementation="auto" is "{report.auto.implementation}" here: {report.auto.reason}.'
    parts += [Text(auto), Text(f"Can run here: {', '.join(report.usable) or 'nothing'}.")]
    parts.append(_problem_table(report) if report.problems else Text("No problems."))
    return Group(*parts)


def _cuda_facts(report: Report) -> dict[str, str | None]:
    extension, host = report.extension, report.host
    return {
        "extension": extension.state,
        "loader's error": extension.error,
        "architectures": ";".join(extension.architectures),
        "kernels": ", ".join(extension.kernels),
        "built with CUDA": extension.cuda,
        "XLA FFI API, build": extension.ffi_api,
        "XLA FFI API, jaxlib": host.ffi_api,
        "Collectives extension, build": extension.collectives,
        "NCCL": host.nccl,
        "NVIDIA driver": host.driver_release,
        "driver runs up to CUDA": extension.driver,
    }


def _facts(title: str, facts: dict[str, str | None]) -> Table:
    table = Table("", "", title=title, title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(Text(name), Text(value or "-"))
    return table


def _device_table(report: Report) -> Table:
    columns = ("id", "process", "platform", "kind", "compute capability")
    title = f"Devices, default platform {report.platform or 'none'}"
    table = Table(*columns, title=title, title_justify="left")
    for each in report.devices:
        row = (each.id, each.process, each.platform, each.kind, each.compute_capability or "-")
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


def _peer_table(matrix: Matrix) -> Table:
    title = "Peer access between CUDA devices"
    table = Table("", *map(str, range(len(matrix))), title=title, title_justify="left")
    for i, row in enumerate(matrix):
        table.add_row(str(i), *("yes" if has_access else "NO" for has_access in row))
    return table


def _problem_table(report: Report) -> Table:
    columns = ("problem", "remedy", "blocks")
    table = Table(*columns, title="Problems", title_justify="left", show_lines=True)
    for each in report.problems:
        blocks = ", ".join(each.blocks) or "nothing"
        table.add_row(Text(each.what), Text(each.remedy), Text(blocks))
    return table
