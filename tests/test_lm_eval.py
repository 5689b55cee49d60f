"""The real lm-evaluation-harness on tasks of local data, against a loop over `Model.logits`."""

import json
import os
import pathlib
import sys
import types
import warnings

import jax
import numpy as np
import pytest

import grok1
from tests.conftest import CACHE

ROOT = pathlib.Path(__file__).parent.parent

# Looked at when it is imported.
os.environ.update(HF_HOME=str(CACHE / "huggingface"), HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1")

# The harness and the packages that it imports warn of their own affairs.
pytestmark = pytest.mark.filterwarnings("ignore")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip(
        "lm_eval", reason="lm-evaluation-harness is not installed: pip install '.[lm-eval]'"
    )
    import lm_eval.tasks

    from grok1.lm_eval import Grok1LM, _generation_options, main


class LocalTasks(lm_eval.tasks.TaskManager):
    """Only those of `--include_path`: to read the harness's own, 14,000 files, takes 20 s."""

    def __init__(self, **options):
        super().__init__(**options, include_defaults=False)


QUESTIONS = [
    {"question": "The first argument is a", "choices": ["string", "purple cow"], "answer": 0},
    {"question": "If the file does not", "choices": ["exist", "banana", "of"], "answer": 0},
    {"question": "Return the number of", "choices": ["Zebra!", "bytes"], "answer": 1},
    {"question": "This method is called with the", "choices": ["qqq", "name", "a"], "answer": 2},
    {"question": "Raises a", "choices": ["ValueError if it is empty", "x"], "answer": 0},
]
TEXTS = ["Return the value of the attribute. " * 3, "The file is opened for reading.\n" * 150]
PROMPTS = ["The first argument is", "If the file", "Return"]


@pytest.fixture
def tasks(tmp_path) -> pathlib.Path:
    """A directory with three tasks and their data."""

    def write(name, documents, lines):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        common = [
            f"task: {name}",
            "dataset_path: json",
            "dataset_kwargs:",
            f"  data_files: {{test: {data}}}",
            "test_split: test",
        ]
        (tmp_path / f"{name}.yaml").write_text("\n".join(common + lines) + "\n")

    write(
        "local_choice",
        QUESTIONS,
        [
            "output_type: multiple_choice",
            "doc_to_text: '{{question}}'",
            "doc_to_choice: choices",
            "doc_to_target: answer",
            "metric_list: [{metric: acc}, {metric: acc_norm}]",
        ],
    )
    write(
        "local_text",
        [{"text": text} for text in TEXTS],
        [
            "output_type: loglikelihood_rolling",
            "doc_to_text: ''",
            "doc_to_target: '{{text}}'",
            "metric_list: [{metric: bits_per_byte}]",
        ],
    )
    write(
        "local_generation",
        [{"prompt": prompt} for prompt in PROMPTS],
        [
            "output_type: generate_until",
            "doc_to_text: '{{prompt}}'",
            "doc_to_target: '{{prompt}}'",
            "generation_kwargs: {until: ['.'], max_gen_toks: 12, do_sample: false}",
            "metric_list: [{metric: exact_match}]",
        ],
    )
    return tmp_path


def continuation(model, context, option):
    """Log-likelihood and greediness of an option, from all logits in float64."""
    before = model.tokenizer.encode(context)
    tokens = np.asarray(model.tokenizer.encode(context + option))
    logits = model.logits(tokens).astype(np.float64)[:-1]
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    places = np.arange(len(before) - 1, len(tokens) - 1)
    following = tokens[len(before) :]
    return logprobs[places, following].sum(), (logits[places].argmax(-1) == following).all()


def request(*args):
    return types.SimpleNamespace(args=args)


def test_the_harness_finds_what_a_loop_finds(tasks, toy, monkeypatch):
    names = "local_choice,local_text,local_generation"
    command = ["lm_eval", "run", "--model", "grok1"]
    command += ["--model_args", f"path={ROOT / 'checkpoints' / 'toy'},mesh=1x1,dtype=float32"]
    command += ["--tasks", names, "--include_path", str(tasks), "--log_samples"]
    command += ["--output_path", str(tasks / "out")]
    monkeypatch.chdir(tasks)
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", LocalTasks)
    main()
    (report,) = (tasks / "out").rglob("results*.json")
    results = json.loads(report.read_text())["results"]
    samples = {
        name: [
            json.loads(line)
            for path in (tasks / "out").rglob(f"samples_{name}_*.jsonl")
            for line in path.read_text().splitlines()
        ]
        for name in names.split(",")
    }

    right, right_by_length = [], []
    for document, sample in zip(QUESTIONS, samples["local_choice"], strict=True):
        options = [f" {choice}" for choice in document["choices"]]
        expected = [continuation(toy, document["question"], option) for option in options]
        found = [(float(one[0]), str(one[1]) == "True") for one in flat(sample["filtered_resps"])]
        np.testing.assert_allclose(
            [one for one, _ in found], [one for one, _ in expected], atol=1e-4
        )
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        likelihoods = np.array([one for one, _ in expected])
        lengths = [len(choice) for choice in document["choices"]]
        right.append(int(likelihoods.argmax()) == document["answer"])
        right_by_length.append(int((likelihoods / lengths).argmax()) == document["answer"])
    assert 0 < np.mean(right) < 1  # questions that would tell a wrong answer from a right one
    assert results["local_choice"]["acc,none"] == np.mean(right)
    assert results["local_choice"]["acc_norm,none"] == np.mean(right_by_length)

    totals = [rolling(toy, text) for text in TEXTS]
    bits = -sum(totals) / np.log(2) / sum(len(text.encode()) for text in TEXTS)
    assert results["local_text"]["bits_per_byte,none"] == pytest.approx(bits, abs=1e-5)

    expected = toy.generate(PROMPTS, max_new_tokens=12, temperature=0, stop=".")
    found = [flat(sample["filtered_resps"])[0] for sample in samples["local_generation"]]
    assert found == [completion.text for completion in expected]


def flat(responses):
    """A sample's responses, however deep the harness nests them."""
    while (
        len(responses) == 1 and isinstance(responses[0], list) and isinstance(responses[0][0], list)
    ):
        responses = responses[0]
    return responses


def rolling(model, text):
    """Log-likelihood of a text behind [BOS], windows one after the other, the last one full."""
    tokens = np.asarray([model.tokenizer.bos_id, *model.tokenizer.encode(text)])
    context, total, done = model.config.sequence_len, 0.0, 1
    while done < len(tokens):
        end = min(done + context, len(tokens))
        inputs = tokens[max(0, end - 1 - context) : end - 1]
        logprobs = np.asarray(jax.nn.log_softmax(model.logits(inputs)), np.float64)
        count = end - done
        total += logprobs[-count:][np.arange(count), tokens[done:end]].sum()
        done = end
    return total


def test_rolling_windows_are_the_harness_s_own(toy):
    from lm_eval.utils import get_rolling_token_windows

    found = Grok1LM(toy, max_length=32).loglikelihood_rolling([request(TEXTS[0] * 4), request("")])
    tokens = toy.tokenizer.encode(TEXTS[0] * 4)
    total = 0.0
    for inputs, predicted in get_rolling_token_windows(tokens, toy.tokenizer.bos_id, 32, 1):
        logprobs = np.asarray(jax.nn.log_softmax(toy.logits(inputs)), np.float64)
        count = len(predicted)
        total += logprobs[-count:][np.arange(count), predicted].sum()
    assert found == [pytest.approx(total, rel=1e-6), 0.0]


def test_long_contexts_lose_their_beginning(toy):
    lm = Grok1LM(toy, max_length=16)
    long, short = ("of the file is " * 40).rstrip(), "of the file is " * 3
    (found,) = lm.loglikelihood([request(long, " opened")])
    tokens = toy.tokenizer.encode(long + " opened")
    expected = toy.score(tokens[-17:], top_k=0).logprobs
    count = len(tokens) - len(toy.tokenizer.encode(long))
    assert found[0] == pytest.approx(expected[-count:].sum(), abs=1e-4)
    options = {"until": [], "max_gen_toks": 4}
    outs = lm.generate_until([request(long, options), request(short, options)])
    prompts = [toy.tokenizer.encode(text)[-12:] for text in (long, short)]
    expected = toy.generate(prompts, max_new_tokens=4, temperature=0)
    assert outs == [completion.text for completion in expected]
    with pytest.raises(ValueError, match=r"a continuation of .* tokens does not fit the context"):
        lm.loglikelihood([request("a", " opened" * 40)])
    with pytest.raises(ValueError, match="max_gen_toks 256 leaves no room for a context in 16"):
        lm.generate_until([request("a", {"until": []})])


def test_positions_and_values_must_fit_the_text(toy):
    long, cut = "of the file is " * 40, "^ScaleHeads: .* is cut into pieces that begin elsewhere"
    with toy.intervene(grok1.ScaleHeads(1, positions=3)) as changed:
        lm = Grok1LM(changed, max_length=16)
        assert len(lm.loglikelihood([request("The first argument is", " a file")])) == 1
        with pytest.raises(ValueError, match="positions must be from 0 to 1, since the text has 2"):
            lm.loglikelihood([request("The", " file")])
        with pytest.raises(ValueError, match=cut):
            lm.loglikelihood([request(long, " opened")])
        with pytest.raises(ValueError, match=cut):
            lm.loglikelihood_rolling([request(long)])
        with pytest.raises(ValueError, match=cut):
            lm.generate_until([request(long, {"until": [], "max_gen_toks": 4})])
    message, patch = (
        r"^Patch: values are of 5 tokens",
        grok1.Patch("residual", np.zeros((6, 5, 128))),
    )
    with toy.intervene(patch) as changed, pytest.raises(ValueError, match=message):
        Grok1LM(changed).loglikelihood([request("The", " file")])


def test_results_come_back_in_the_order_of_the_requests(toy):
    lm = Grok1LM(toy)
    pairs = [("The " * n, " file") for n in (3, 1, 40, 2, 17)]
    together = lm.loglikelihood([request(*pair) for pair in pairs])
    for pair, found in zip(pairs, together, strict=True):
        (alone,) = lm.loglikelihood([request(*pair)])
        assert found[0] == pytest.approx(alone[0], abs=1e-4)
    options = [{"until": ["."], "max_gen_toks": n} for n in (2, 5, 2)]
    outs = lm.generate_until([request(p, o) for p, o in zip(PROMPTS, options, strict=True)])
    for prompt, option, found in zip(PROMPTS, options, outs, strict=True):
        assert found == lm.generate_until([request(prompt, option)])[0]


def test_bos_stands_before_what_has_no_context_or_where_it_is_asked_for(toy):
    (bare,) = Grok1LM(toy).loglikelihood([request("", "The file")])
    assert bare[0] == pytest.approx(toy.score("The file", add_bos=True).total_logprob, abs=1e-4)
    (behind,) = Grok1LM(toy, add_bos=True).loglikelihood([request("The", " file")])
    cut = 1 + len(toy.tokenizer.encode("The"))
    expected = toy.score("The file", add_bos=True).logprobs[cut:].sum()
    assert behind[0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"until": "\n"}, {"max_new_tokens": 256, "stop": ["\n"], "temperature": 0}),
        (
            {"until": ["a", ""], "max_gen_toks": 3, "do_sample": False, "temperature": 0.7},
            {"max_new_tokens": 3, "stop": ["a"], "temperature": 0},
        ),
        (
            {"until": None, "max_tokens": 3, "temperature": 0.7, "top_k": 9},
            {"max_new_tokens": 3, "stop": [], "temperature": 0.7, "top_p": 1.0, "top_k": 9},
        ),
        (
            {"do_sample": True},
            {"max_new_tokens": 256, "stop": [], "temperature": 1.0, "top_p": 1.0},
        ),
        (
            {"num_beams": 1, "repetition_penalty": 1, "top_k": 0, "temperature": None},
            {"max_new_tokens": 256, "stop": [], "temperature": 0},
        ),
        (
            {"max_gen_toks": None, "do_sample": True, "top_k": -1, "typical_p": 1.0},
            {"max_new_tokens": 256, "stop": [], "temperature": 1.0, "top_p": 1.0},
        ),
        (
            {"until": "a", "do_sample": None, "temperature": 0.2, "top_p": None, "min_p": None},
            {"max_new_tokens": 256, "stop": ["a"], "temperature": 0.2, "top_p": 1.0},
        ),
    ],
)
def test_generation_options_mean_what_the_harness_means(given, expected):
    assert _generation_options(given) == expected


def test_the_options_of_load_are_its_own(monkeypatch, toy):
    given = {}
    monkeypatch.setattr("grok1.lm_eval.load", lambda path, **options: given.update(options) or toy)
    Grok1LM.create_from_arg_string(
        "path=toy,mesh=1x1,dtype=float32,cache_dtype=int8,layers=2,router_softcap=30,"
        "renormalize_gates=true,embedding_dtype=bfloat16,offload=disk,memory=16GB,"
        "tokenizer=tokenizer.model,progress=false"
    )
    assert given == {
        "mesh": "1x1", "dtype": "float32", "cache_dtype": "int8", "layers": 2,
        "router_softcap": 30, "renormalize_gates": True, "embedding_dtype": "bfloat16",
        "offload": "disk", "memory": "16GB", "tokenizer": "tokenizer.model", "progress": False,
    }  # fmt: skip
    given.clear()
    # The harness takes this word for Python's None.
    Grok1LM.create_from_arg_string("path=toy,offload=none")
    assert given == {"offload": "none"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("path=nowhere", r"nowhere\S*: there is no such directory"),
        ("path=toy,mesh=all", "mesh must be two sizes above 0"),
        ("path=toy,tokenizer=nowhere.model", "nowhere.model: no such file"),
        ("path=toy,dtyp=float32", "model_args dtyp are unknown"),
    ],
)
def test_what_the_command_refuses_is_one_line(arguments, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command = ["lm_eval", "run", "--model", "grok1", "--model_args", arguments, "--tasks", "none"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(
        "lm_eval.__main__.cli_evaluate", lambda: Grok1LM.create_from_arg_string(arguments)
    )
    with pytest.raises(SystemExit, match=rf"^grok1.lm_eval: .*{said}") as stopped:
        main()
    assert "\n" not in str(stopped.value)


def test_errors_of_the_harness_stay_as_they_are(monkeypatch):
    def fail():
        json.loads("{")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", fail)
    with pytest.raises(json.JSONDecodeError):
        main()


@pytest.mark.parametrize(
    ("context", "option"), [("an", "d"), ("an", " elephant"), ("retur", "n"), ("an", "d the n")]
)
def test_what_joins_is_scored_whole(toy, context, option):
    before, joined = (toy.tokenizer.encode(text) for text in (context, context + option))
    same = [one == other for one, other in zip(before, joined, strict=False)]
    cut = same.index(False) if False in same else len(same)
    # Nothing precedes the first token of a text; [BOS] stands before it where it is scored.
    score = toy.score(context + option, top_k=0, add_bos=cut == 0)
    scored = slice(max(cut, 1), None)
    (found,) = Grok1LM(toy).loglikelihood([request(context, option)])
    assert found[0] == pytest.approx(score.logprobs[scored].sum(), abs=1e-4)
    assert found[1] == (score.ranks[scored] == 0).all()
    assert found[0] < 0


def test_no_likelihood_is_of_nothing(toy):
    found = Grok1LM(toy).loglikelihood(
        [request("The file", ""), request("", "a"), request(" ", "")]
    )
    assert all(logprob < 0 for logprob, _ in found)
    with pytest.raises(ValueError, match="context and continuation are both empty; give some text"):
        Grok1LM(toy).loglikelihood([request("", "")])


def test_what_it_cannot_do_is_said(toy, nano_path):
    for given in ({"num_beams": 4}, {"repetition_penalty": 1.1}, {"penalty_alpha": 0.6}):
        [(name, value)] = given.items()
        with pytest.raises(ValueError, match=f"generation options {name}: {value} cannot be had"):
            _generation_options({"until": [], "num_beams": 1, **given})
    with pytest.raises(TypeError, match="model_args batch, pretrained are unknown; known are path"):
        Grok1LM(nano_path, pretrained=True, batch=2)
    with pytest.raises(TypeError, match="mesh, layers cannot be chosen for a model that is loaded"):
        Grok1LM(toy, mesh="1x1", layers=2)
    with pytest.raises(ValueError, match="the harness needs a tokenizer, and this model has none"):
        Grok1LM(nano_path, mesh="1x1")
    with pytest.raises(ValueError, match=r"mesh must be two sizes above 0, .* as 1x8, found 'all'"):
        Grok1LM(nano_path, mesh="all")
    with pytest.raises(ValueError, match="max_length must be from 2 to 1024, found 4096"):
        Grok1LM(toy, max_length=4096)
    for name, value, message in (
        ("max_length", 2.5, r"max_length must be a whole number, found 2\.5"),
        ("max_length", "all", "max_length must be a whole number, found 'all'"),
        ("seed", None, "seed must be a whole number, found None"),
        ("add_bos", "yes", "add_bos must be True or False, found 'yes'"),
    ):
        with pytest.raises(TypeError, match=message):
            Grok1LM("nowhere", **{name: value})
