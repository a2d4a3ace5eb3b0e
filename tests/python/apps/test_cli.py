"""The command line: exit status, one sentence for what is wrong, and score and prune end to end."""

from __future__ import annotations

import json
import math
import shutil

import headwise as hw
import pytest
from headwise.apps.cli import build_parser, main
from safetensors.torch import load_file, save_file
from support.compare_fixtures import write_model


def fails(capsys, status: int, *arguments: str) -> str:
    """The last line on standard error of a command that must fail with ``status``."""
    assert main([str(argument) for argument in arguments]) == status
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err.strip().splitlines()[-1]


def test_every_command_has_the_common_options():
    for command in ("compare", "bench", "explain", "score", "prune"):
        text = build_parser()._subparsers._group_actions[0].choices[command].format_help()
        for option in ("--json", "--out", "--seed", "--device", "--threads"):
            assert option in text


def test_no_command_or_an_unknown_one_is_bad_use(capsys):
    assert main([]) == 2
    assert main(["comprae"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_help_and_version_are_not_failures(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == hw._C.__version__
    assert main(["compare", "--help"]) == 0


@pytest.mark.parametrize("budget", ["0", "1.5", "-0.2", "nan", "half"])
def test_a_budget_outside_its_range_is_refused(capsys, budget):
    message = fails(capsys, 2, "compare", "--keep", budget)
    assert message.startswith("headwise compare: error: argument --keep: ")


def test_an_unknown_method_names_those_like_it(capsys, tmp_path):
    for name, meant in (
        ("slepng", ", did you mean sleeping?"),
        ("fitted_gates", ", did you mean fitted-gates or fitted-gates-trained?"),
        ("xyzzy", ":"),
    ):
        message = fails(capsys, 2, "compare", "--methods", name, "--out", tmp_path)
        assert message == (
            f"headwise compare: unknown method '{name}'{meant} --list-methods prints what there is"
        )
    assert fails(capsys, 2, "compare", "--methods", "michle", "--out", tmp_path).count("michel")


def test_unknown_task(capsys, tmp_path):
    assert fails(capsys, 2, "compare", "--task", "imdb", "--out", tmp_path) == (
        "headwise compare: task must be one of reviews, snippets, products, tweets, topics, "
        "thesaurus, docstrings, mixed, mixed-domains, instructions, digits, speech, translation, "
        "got 'imdb'"
    )


def test_unknown_device(capsys, tmp_path):
    for device in ("gpu", "meta"):
        assert fails(capsys, 2, "compare", "--device", device, "--out", tmp_path) == (
            f"headwise compare: device must be cpu, cuda or cuda:N, got {device!r}"
        )
    message = fails(capsys, 2, "compare", "--device", "cuda:99", "--out", tmp_path)
    assert message.startswith("headwise compare: there is no device cuda:99: PyTorch sees ")


def test_data_without_the_column(capsys, tiny_texts, tmp_path):
    message = fails(
        capsys, 2, "compare", "--data", tiny_texts, "--label", "stars", "--text", "review",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert message == (
        f"headwise compare: {tiny_texts} has no column 'stars'; it has 'review', 'mood', 'film'"
    )


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.csv", "", "{path} is empty"),
        ("a.csv", "text,label\n", "{path} has no rows"),
        ("a.csv", "text,label\n" + "x,up\n" * 20, "at least two different labels, got one ('up')"),
        ("a.csv", "text,label\n" + "x,up\n" * 20 + "y,down\n", "'down' has 1"),
        (
            "a.csv",
            "text,label\nx\n",
            "line 2 of {path} has 1 cells, but the header has 2",
        ),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text"\n', "line 2 of {path} is not JSON"),
        ("a.jsonl", "[1, 2]\n", "line 1 of {path} must be a JSON object, got [1, 2]"),
        ("a.txt", "hello", "data must be a .csv or .jsonl file, got 'a.txt'"),
        ("a.csv", b"text,label\n\xff\xfe,1\n", "{path} is not UTF-8 text (byte 11)"),
    ],
)
def test_data_that_cannot_be_used(capsys, tmp_path, name, content, complaint):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = fails(capsys, 2, "compare", "--data", path, "--out", tmp_path / "out")
    assert complaint.format(path=path) in message


def test_data_that_is_not_there(capsys, tmp_path):
    message = fails(capsys, 2, "compare", "--data", tmp_path / "no.csv", "--out", tmp_path)
    assert message == f"headwise compare: there is no file {tmp_path / 'no.csv'}"


def test_a_model_folder_without_weights(capsys, tmp_path):
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    message = fails(capsys, 2, "compare", "--model", folder, "--out", tmp_path / "out")
    assert message == (
        f"headwise compare: the model folder {folder} has no weights "
        "(model.safetensors or pytorch_model.bin)"
    )
    (folder / "config.json").unlink()
    message = fails(capsys, 2, "compare", "--model", folder, "--out", tmp_path / "out")
    assert message == f"headwise compare: the model folder {folder} has no config.json"
    message = fails(capsys, 2, "compare", "--model", tmp_path / "no", "--out", tmp_path / "out")
    assert message == f"headwise compare: there is no model folder {tmp_path / 'no'}"


def test_a_truncated_model(capsys, tmp_path, tiny_texts):
    folder = write_model(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    message = fails(
        capsys, 2, "score", "--model", folder, "--data", tiny_texts, "--text", "review",
        "--label", "mood",
    )  # fmt: skip
    assert message.startswith(f"headwise score: cannot load the model folder {folder}: ")


def test_an_out_folder_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    assert fails(capsys, 2, "compare", "--out", out).startswith(
        f"headwise compare: cannot write to the folder {out}: "
    )
    assert fails(capsys, 2, "compare", "--json", tmp_path / "no" / "a.json").startswith(
        f"headwise compare: cannot write {tmp_path / 'no' / 'a.json'}: there is no folder "
    )


def test_a_full_disk_is_one_sentence(capsys, monkeypatch, tmp_path):
    import errno

    from headwise.apps.cli import compare

    def full(options):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "results.json"))

    monkeypatch.setattr(compare, "run", full)
    assert fails(capsys, 1, "compare") == (
        f"headwise compare: {tmp_path / 'results.json'}: No space left on device"
    )


def score_and_prune(tmp_path, model, texts, capsys) -> dict:
    arguments = ["--model", model, "--data", texts, "--text", "review", "--label", "mood"]
    arguments += ["--metrics", "michel", "entropy", "--keep", "0.5", "--limit", "64"]
    arguments += ["--out", tmp_path / "scores", "--json", tmp_path / "scores.json"]
    assert main(["score", *map(str, arguments)]) == 0
    assert "michel" in capsys.readouterr().out
    result = json.loads((tmp_path / "scores.json").read_text())
    assert result == json.loads((tmp_path / "scores" / "scores.json").read_text())
    plan = tmp_path / "scores" / "plan-michel.json"
    arguments = ["--model", model, "--plan", plan, "--out", tmp_path / "small"]
    assert main(["prune", *map(str, arguments), "--json", str(tmp_path / "prune.json")]) == 0
    assert "heads 8 -> 4" in capsys.readouterr().out
    return result


def test_score_and_prune(tmp_path, tiny_texts, capsys):
    model = write_model(tmp_path / "model")
    known_labels(model)
    result = score_and_prune(tmp_path, model, tiny_texts, capsys)
    assert result["texts"] == 64
    assert [len(heads) for heads in result["scores"]["michel"].values()] == [4, 4]
    assert all(0 <= e <= 1 for heads in result["scores"]["entropy"].values() for e in heads)

    small = hw.load(tmp_path / "small")
    assert sum(layer.num_heads for layer in hw.attention_layers(small).values()) == 4
    pruned = json.loads((tmp_path / "prune.json").read_text())
    assert pruned["heads"] == [8, 4]
    assert pruned["parameters"][1] < pruned["parameters"][0]

    # A folder that headwise wrote is a model too.
    arguments = ["--model", tmp_path / "small", "--data", tiny_texts, "--text", "review"]
    assert main(["score", *map(str, arguments), "--label", "mood", "--limit", "16"]) == 0


def test_score_takes_other_encoders_long_texts_and_one_label(tmp_path, tiny_model, capsys):
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = DistilBertConfig(
        vocab_size=30, dim=32, n_layers=2, n_heads=4, hidden_dim=32, max_position_embeddings=24
    )
    DistilBertForSequenceClassification(config).save_pretrained(model)
    texts = tmp_path / "texts.csv"
    texts.write_text("text,label\n" + "good film,1\n" + "very bad " * 100 + ",1\n")
    assert main(["score", "--model", str(model), "--data", str(texts)]) == 0
    assert "transformer.layer.0.attention" in capsys.readouterr().out
    message = fails(capsys, 2, "score", "--model", model, "--data", texts, "--max-length", 2)
    assert message == (
        "headwise score: max_length must leave room for tokens of the text beside 2 special ones, "
        "got 2"
    )


def test_prune_says_that_nothing_could_be_tuned(tmp_path, tiny_model, capsys):
    from transformers import AlbertConfig, AlbertForSequenceClassification

    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = AlbertConfig(
        vocab_size=30,
        embedding_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
    )
    AlbertForSequenceClassification(config).save_pretrained(model)
    texts = tmp_path / "texts.csv"
    texts.write_text("text,label\n" + "good film,1\nvery bad,0\n" * 20)
    arguments = ["--model", model, "--data", texts, "--method", "kwon", "--keep", "0.5"]
    arguments += ["--out", tmp_path / "small", "--json", tmp_path / "report.json"]
    assert main(["prune", *map(str, arguments)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())["report"]
    assert report["tuning_loss"] is None and "no transformer layers" in report["tuning_skipped"]


def test_a_checkpoint_of_a_converted_model_is_the_original_s(tmp_path, tiny_model):
    from transformers import BertForSequenceClassification

    folder = shutil.copytree(tiny_model, tmp_path / "model")
    original = BertForSequenceClassification.from_pretrained(tiny_model)
    hw.convert(BertForSequenceClassification.from_pretrained(folder)).save_pretrained(folder)
    read, report = BertForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, value in original.state_dict().items():
        assert read.state_dict()[name].equal(value), name


def known_labels(model) -> None:
    """The model's classes are those of the tiny texts."""
    config = json.loads((model / "config.json").read_text())
    config.update(id2label={"0": "down", "1": "up"}, label2id={"down": 0, "up": 1})
    (model / "config.json").write_text(json.dumps(config))


def test_scores_by_searches(tmp_path, tiny_texts, capsys):
    model = write_model(tmp_path / "model")
    known_labels(model)
    arguments = ["score", "--model", model, "--data", tiny_texts, "--text", "review"]
    arguments += ["--label", "mood", "--limit", "16", "--keep", "0.5", "--out", tmp_path / "out"]
    arguments += ["--journal", tmp_path / "steps"]
    metrics = ["lrp", "ablation", "entropy", "all-but-one"]
    assert main([*map(str, arguments), "--metrics", *metrics]) == 0
    assert "lrp: conservation error" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert list(result["scores"]) == metrics
    assert result["details"]["lrp"]["conservation_error"] < 1e-4
    p_values = [p for row in result["details"]["ablation"]["p_value"].values() for p in row]
    assert len(p_values) == 8 and all(0 < p <= 1 for p in p_values)
    assert {path.name for path in (tmp_path / "out").glob("plan-*")} == {
        "plan-lrp.json", "plan-ablation.json", "plan-all-but-one.json",
    }  # fmt: skip
    assert {path.name for path in (tmp_path / "steps").iterdir()} == {
        "ablation.jsonl", "all-but-one.jsonl",
    }  # fmt: skip


def test_prune_finds_heads_itself(tmp_path, tiny_texts, capsys):
    model = write_model(tmp_path / "model")
    known_labels(model)
    arguments = ["prune", "--model", model, "--data", tiny_texts, "--text", "review"]
    arguments += ["--label", "mood", "--limit", "16", "--keep", "0.25", "--out", tmp_path / "small"]
    arguments += ["--exact", "--step", "0.5", "--journal", tmp_path / "steps"]
    assert main([str(argument) for argument in arguments]) == 0
    assert "heads 8 -> 2" in capsys.readouterr().out
    plan = hw.HeadPlan.load(tmp_path / "small" / "plan.json")
    assert plan.heads_kept == 2 and plan.metadata["exact"]
    small = hw.load(tmp_path / "small")
    assert [layer.num_heads for layer in hw.attention_layers(small).values()] == [
        len(entry.heads) for entry in plan.layers
    ]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "prune needs one of --plan FILE, --keep SHARE and --gates"),
        (
            ["--keep", "0.5", "--plan", "p"],
            "prune needs one of --plan FILE, --keep SHARE and --gates",
        ),
        (["--keep", "0.5"], "--keep scores heads on labelled inputs, so it needs --data or --task"),
        (["--plan", "p", "--exact"], "--exact is a way of finding heads, so it needs --keep, not"),
        (["--plan", "p", "--method", "kwon"], "--method is a way of finding heads, so it needs"),
        (["--plan", "p", "--metric", "hies"], "--metric is a way of finding heads, so it needs"),
        (["--gates", "--data", "d.csv"], "--data is a way of finding heads, so it needs --keep"),
        (
            ["--keep", "0.5", "--data", "d.csv", "--method", "kwon", "--metric", "hies"],
            "--metric belongs to --method ranking",
        ),
        (
            ["--keep", "0.5", "--data", "d.csv", "--metric", "use", "--exact"],
            "--exact is of a search that scores heads in steps, so it cannot be used with --metric",
        ),
        (["--keep", "0.5", "--data", "d.csv", "--step", "0.2"], "--step needs --exact"),
        (["--latency", "0.5"], "--latency needs --method kwon"),
        (
            ["--latency", "0.5", "--keep", "0.5", "--method", "kwon"],
            "--method kwon needs --keep SHARE or --latency SHARE, one of the two",
        ),
        (
            ["--latency", "0.5", "--method", "kwon"],
            "--keep scores heads on labelled inputs, so it n",
        ),
    ],
)
def test_prune_needs_a_plan_or_texts(tmp_path, tiny_model, capsys, arguments, complaint):
    message = fails(
        capsys, 2, "prune", "--model", tiny_model, "--out", tmp_path / "small", *arguments
    )
    assert message.startswith(f"headwise prune: {complaint}")


def test_compare_refuses_columns_of_a_bundled_task(tmp_path, capsys):
    message = fails(capsys, 2, "compare", "--task", "reviews", "--group", "film", "--out", tmp_path)
    assert message == "headwise compare: --group names a column of own data, so it needs --data"


def test_prune_finds_heads_and_neurons_without_training(tmp_path, tiny_texts, capsys):
    model = write_model(tmp_path / "model")
    known_labels(model)
    arguments = ["--model", model, "--data", tiny_texts, "--text", "review", "--label", "mood"]
    arguments += ["--method", "kwon", "--keep", "0.6", "--limit", "64", "--out", tmp_path / "small"]
    assert main(["prune", *map(str, arguments), "--json", str(tmp_path / "prune.json")]) == 0
    assert "heads 8 -> " in capsys.readouterr().out
    result = json.loads((tmp_path / "prune.json").read_text())
    assert result["report"]["macs"] <= 0.6
    plan = hw.pruning.StructurePlan.load(tmp_path / "small" / "plan.json")
    small = hw.pruning.structure(hw.load(tmp_path / "small"))
    assert sum(small.neurons.values()) == plan.neurons_kept < 128
    # The plan that was written can be given in its turn.
    again = ["--model", model, "--plan", tmp_path / "small" / "plan.json", "--out", tmp_path / "b"]
    assert main(["prune", *map(str, again)]) == 0
    weights = "model.safetensors"
    assert (tmp_path / "b" / weights).read_bytes() == (tmp_path / "small" / weights).read_bytes()


def test_score_refuses_labels_that_the_model_does_not_know(tmp_path, tiny_texts, capsys):
    model = write_model(tmp_path / "model")
    message = fails(
        capsys, 2, "score", "--model", model, "--data", tiny_texts, "--text", "review",
        "--label", "mood",
    )  # fmt: skip
    assert message == (
        "headwise score: label 'down' is none of the model's classes: 'LABEL_0', 'LABEL_1'"
    )


def spoil(model, change) -> None:
    """``change(state)`` of a model's folder."""
    state = load_file(model / "model.safetensors")
    change(state)
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (0.0, "michel is zero for every head: the loss does not depend on the heads"),
        (math.nan, "loss_fn must return a finite loss, got NaN or infinity"),
    ],
)
def test_a_model_that_says_nothing(tmp_path, tiny_texts, capsys, value, complaint):
    """Its classifier is zero, so that no head changes the loss, or not a number."""
    model = write_model(tmp_path / "model")
    known_labels(model)
    spoil(model, lambda state: state["classifier.weight"].fill_(value))
    texts = ["--model", model, "--data", tiny_texts, "--text", "review", "--label", "mood"]
    texts += ["--limit", "8", "--out", tmp_path / "out"]
    assert fails(capsys, 2, "score", *texts, "--metrics", "michel") == (
        f"headwise score: {complaint}"
    )
    assert fails(capsys, 2, "prune", *texts, "--keep", "0.5") == f"headwise prune: {complaint}"
    assert not (tmp_path / "out" / "plan.json").exists()


def test_a_journal_of_other_texts_is_refused(tmp_path, tiny_texts, capsys):
    model = write_model(tmp_path / "model")
    known_labels(model)
    arguments = ["score", "--model", model, "--data", tiny_texts, "--text", "review"]
    arguments += ["--label", "mood", "--metrics", "ablation", "--journal", tmp_path / "steps"]
    assert main([*map(str, arguments), "--limit", "8"]) == 0
    assert "is of ablation with data=" in fails(capsys, 2, *arguments, "--limit", "9")


def test_a_share_that_cannot_be_reached_names_the_nearest(tmp_path, tiny_texts, capsys):
    model = write_model(tmp_path / "model")
    known_labels(model)
    message = fails(
        capsys, 2, "prune", "--model", model, "--data", tiny_texts, "--text", "review", "--label",
        "mood", "--limit", "16", "--method", "kwon", "--latency", "0.0001", "--out",
        tmp_path / "small",
    )  # fmt: skip
    assert "latency=0.0001 cannot be reached: " in message and "the nearest is latency=" in message
    assert not (tmp_path / "small").exists()


def test_prune_refuses_what_is_not_a_plan(tmp_path, tiny_model, capsys):
    path = tmp_path / "plan.json"
    path.write_text('{"format": "headwise.plan", "version": 1}')
    arguments = ["prune", "--model", tiny_model, "--plan", path, "--out", tmp_path / "small"]
    message = fails(capsys, 2, *arguments)
    assert message.startswith(f"headwise prune: {path} is not a plan: ")
    assert not (tmp_path / "small").exists()
    assert fails(capsys, 2, *arguments[:3], "--plan", tmp_path / "no", "--out", tmp_path) == (
        f"headwise prune: there is no plan {tmp_path / 'no'}"
    )


def test_prune_does_not_overwrite_its_model(tmp_path, tiny_model, capsys):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    path = tmp_path / "plan.json"
    path.write_text("{}")
    assert fails(capsys, 2, "prune", "--model", model, "--plan", path, "--out", model) == (
        "headwise prune: --out must not be the folder of the model that is pruned"
    )
