"""An explanation in a few plain sentences."""

from __future__ import annotations

from typing import Any


def name_of(layer: dict[str, Any], head: dict[str, Any]) -> str:
    """A readable name of a head: its place in the forward and its number, both from 0."""
    return f"layer {layer['site']} head {head['head']}"


def summarise(entry: dict[str, Any]) -> str:
    """One input of a ``headwise.explanation`` as text: which heads ran, how close it was, and their
    effect."""
    pairs = [(layer, head) for layer in entry["layers"] for head in layer["heads"]]
    sentences = [f"{entry['heads_on']} of {entry['heads']} heads ran."]
    ways = {layer["gate"].get("how") for layer in entry["layers"]}
    if len(ways) == 1 and None not in ways:
        sentences.extend(ways)
    if entry.get("plan") is not None:
        sentences.append(_plan_told(entry["plan"]))
    if entry.get("tokens_cut"):
        kept = entry["layers"][0]["queries"] if entry["layers"] else 0
        sentences.append(
            f"The text was cut: its last {entry['tokens_cut']:,} tokens were left out, and all of "
            f"this is about the first {kept:,}."
        )
    if entry.get("tokens_unknown"):
        unknown = entry["tokens_unknown"]
        sentences.append(
            f"{unknown:,} of its tokens {'is' if unknown == 1 else 'are'} unknown to the "
            "tokenizer, which is all that the model sees of them."
        )
    prediction = entry["prediction"]
    if prediction is not None:
        label = prediction["label"] if prediction["label"] is not None else prediction["class"]
        probability = prediction["probabilities"][prediction["class"]]
        sentences.append(f"The model predicts {label} with probability {probability:.2f}.")
    close = [p for p in pairs if p[1]["margin"] is not None]
    if close and any(layer["gate"]["rule"] != "random" for layer, _ in close):
        layer, head = min(close, key=lambda pair: abs(pair[1]["margin"]))
        state = "dropped" if head["on"] else "chosen"
        sentences.append(
            f"The closest decision was {name_of(layer, head)}: a relevance of "
            f"{_told(head['relevance'])}, {_told(abs(head['margin']))} from being {state}."
        )
    measured = [p for p in pairs if p[1]["effect"] is not None]
    if measured:
        layer, head = max(measured, key=lambda pair: abs(pair[1]["effect"]))
        verb = "raises" if head["effect"] >= 0 else "lowers"
        state = "which ran" if head["on"] else "which slept"
        sentences.append(
            f"The head that matters most is {name_of(layer, head)}, {state}: running it {verb} the "
            f"log-probability of the prediction by {_told(abs(head['effect']))}."
        )
        if entry["agreement"] is not None:
            sentences.append(
                "What the gates prefer and what helps the prediction have a rank correlation of "
                f"{entry['agreement']['mean']:+.2f}."
            )
        turning = sum(bool(head["changes_prediction"]) for _, head in measured)
        sentences.append(
            "No single head changes the prediction when it is toggled."
            if turning == 0
            else f"{turning} {'head changes' if turning == 1 else 'heads change'} the prediction "
            "when toggled alone."
        )
    return " ".join(sentences)


def _plan_told(plan: dict[str, Any]) -> str:
    """The plan of a bank that the input follows, and how far the next one was."""
    if plan["next_plan"] is None:
        return f"It follows the bank's only plan, {plan['name']!r}."
    following = plan["plans"][plan["next_plan"]]
    return (
        f"It follows plan {plan['name']!r}, one of {len(plan['plans'])}: the router scores it "
        f"{_told(plan['margin'])} above the next, {following!r}."
    )


def _told(value: float) -> str:
    """Three decimals; two significant digits for smaller numbers."""
    return f"{value:.1e}" if 0 < abs(value) < 5e-4 else f"{value:.3f}"
