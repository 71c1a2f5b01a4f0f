"""What a run of the queues' benchmark found, as Markdown: tables, and who wins where."""

from typing import Any

OURS = "RCQS"
# Better is: more items a second, less processor time, a shorter way.
BARS = (("items a second", 1), ("processor time", -1), ("median transfer", -1))


def _values(one: dict[str, Any]) -> tuple[dict[str, float], ...]:
    return one["items_per_s"], one["cpu_ns_per_item"], one["transfer"]["median_ns"]


def _cell(one: dict[str, Any]) -> str:
    rate, cpu, transfer = _values(one)
    spread = f"{rate['min'] / 1e6:.1f}-{rate['max'] / 1e6:.1f}"
    return f"{rate['median'] / 1e6:.1f} ({spread}) / {cpu['median']:.0f} / {_short(transfer['median'])}"


def _short(time_ns: float) -> str:
    return f"{time_ns:.0f} ns" if time_ns < 1000 else f"{time_ns / 1000:.1f} us"


def _verdict(sign: int, ours: dict[str, float], rivals: list[tuple[str, dict[str, float]]]) -> str:
    name, best = max(rivals, key=lambda rival: sign * rival[1]["median"])
    ratio = (best["median"] / ours["median"]) ** sign
    if ratio <= 1:
        return f"ahead ({name} {1 / ratio:.2f} times behind)"
    overlap = best["min"] <= ours["max"] and ours["min"] <= best["max"]
    return f"{name} {ratio:.2f} times as good" + (", within the spread" if overlap else "")


def markdown(report: dict[str, Any]) -> str:
    native, load = report["native"], report["load_average"]
    lines = [
        "# The queues beside their rivals",
        "",
        "Written by `make bench-queues`, which does so anew. Million items a second, median (least-most)"
        " / processor ns an item, the work between operations included / median transfer.",
        f"Load average {load['before'][0]:.1f} before, {load['after'][0]:.1f} after;"
        f" {report['elapsed_s']:.0f} s.",
    ]
    for size, method in sorted({(one["item_bytes"], one["method"]) for one in native}):
        chosen = [one for one in native if (one["item_bytes"], one["method"]) == (size, method)]
        threads = sorted({one["threads"] for one in chosen})
        lines += ["", f"## {size} bytes, {method}", "", "| threads | " + " | ".join(map(str, threads)) + " |"]
        lines.append("|" + "---|" * (len(threads) + 1))
        for queue in dict.fromkeys(one["queue"] for one in chosen):
            cells = {one["threads"]: _cell(one) for one in chosen if one["queue"] == queue}
            lines.append(f"| {queue} | " + " | ".join(cells.get(count, "") for count in threads) + " |")
        lines += _comparison(chosen, threads)
    lines += ["", "## Python, 64 bytes", "", "| processes | queue | items a second | processor ns an item |"]
    lines.append("|---|---|---|---|")
    for one in report["python"]:
        rate, cpu = one["items_per_s"], one["cpu_ns_per_item"]
        spread = f"{rate['median']:,.0f} ({rate['min']:,.0f}-{rate['max']:,.0f})"
        lines.append(f"| {one['processes']} | {one['queue']} | {spread} | {cpu['median']:,.0f} |")
    return "\n".join([*lines, ""])


def _comparison(chosen: list[dict[str, Any]], threads: list[int]) -> list[str]:
    """RCQS with and without the bound beside the best rival, for each number of threads."""
    lines: list[str] = []
    for ours in (OURS, f"{OURS}, free lanes"):
        for count in threads:
            here = {one["queue"]: _values(one) for one in chosen if one["threads"] == count}
            if ours not in here:
                continue
            rivals = [(name, values) for name, values in here.items() if not name.startswith("RCQ")]
            verdicts = [
                _verdict(sign, here[ours][index], [(name, values[index]) for name, values in rivals])
                for index, (_, sign) in enumerate(BARS)
                if rivals
            ]
            lines.append(f"| {ours} | {count} | " + " | ".join(verdicts) + " |")
    head = ["", "| | threads | " + " | ".join(label for label, _ in BARS) + " |", "|---|---|---|---|---|"]
    return [*head, *lines] if lines else []
