"""Reading job files: what is accepted, and every message for what is not."""

import os
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raynium.config.load import (
    dump_yaml,
    load_config,
    parse_config,
    preset_names,
)
from raynium.config.reference import brief
from raynium.config.schema import Config
from raynium.errors import ConfigError

pytestmark = pytest.mark.quick

MINIMAL = """
run: {name: tiny}
model: {vocab_size: 64, hidden_size: 8, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 4,
        ffn_size: 16, max_seq_len: 32}
data: {path: store, seq_len: 16}
train: {steps: 10, global_batch_size: 4}
"""


def problems_of(text=MINIMAL, overrides=(), **kwargs):
    with pytest.raises(ConfigError) as caught:
        parse_config(text, overrides, **kwargs)
    return caught.value.problems


def only_problem_of(*args, **kwargs):
    problems = problems_of(*args, **kwargs)
    assert len(problems) == 1, problems
    return problems[0]


# ------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("optimizer.learning_rate=1e-4", lambda c: c.optimizer.learning_rate == 1e-4),  # text in YAML 1.1
        ("optimizer.learning_rate=3", lambda c: c.optimizer.learning_rate == 3.0),
        ("train.steps=1e3", lambda c: c.train.steps == 1000),
        ("train.steps=1_000", lambda c: c.train.steps == 1000),
        ("train.steps=010", lambda c: c.train.steps == 10),  # octal in YAML 1.1
        ("train.steps = 7 ", lambda c: c.train.steps == 7),
        ("run.name=123", lambda c: c.run.name == "123"),
        ("run.name=1e3", lambda c: c.run.name == "1e3"),
        ("run.name=on", lambda c: c.run.name == "on"),  # true in YAML 1.1
        ("run.name=null", lambda c: c.run.name == "null"),
        ('run.name="quoted"', lambda c: c.run.name == "quoted"),
        ("data.path=s3://bucket/a: b #c", lambda c: c.data.path == "s3://bucket/a: b #c"),
        ("data.source=null", lambda c: c.data.source is None),
        ("data.source=", lambda c: c.data.source is None),
        ("data.source=~", lambda c: c.data.source is None),
        ("data.source=~/corpus", lambda c: c.data.source == "~/corpus"),
        ("engine.compile=none", lambda c: c.engine.compile == "none"),
        ("optimizer.betas=[0.8, 99e-2]", lambda c: c.optimizer.betas == (0.8, 0.99)),
        ('sample.prompts=[no, 1, "import "]', lambda c: c.sample.prompts == ("no", "1", "import ")),
        ("evaluate={every_steps: 5}", lambda c: c.evaluate.every_steps == 5),
        ("model.rope_scaling=null", lambda c: c.model.rope_scaling is None),
    ],
)
def test_an_override_is_read_as_the_schema_means_it(override, read):
    assert read(parse_config(MINIMAL, [override]))


def test_the_file_is_read_by_the_same_rules():
    text = MINIMAL.replace("name: tiny", "name: 007").replace("steps: 10", "steps: 1e2")
    config = parse_config(text + "optimizer: {learning_rate: 1e-4}\nsample:\n  prompts: [yes, off, 12]\n")
    assert (config.run.name, config.train.steps, config.optimizer.learning_rate) == ("007", 100, 1e-4)
    assert config.sample.prompts == ("yes", "off", "12")


def test_overrides_may_be_a_mapping_of_python_values():
    overrides = {
        "train.steps": 50,
        "run.name": 123,
        "data.source": None,
        "data.path": Path("folder/store"),
        "optimizer.betas": (0.5, 0.6),
        "optimizer.eps": "1e-7",
        "model.rope_scaling.factor": 8,
        "model.rope_scaling.low_freq_factor": 1,
        "model.rope_scaling.high_freq_factor": 4,
        "model.rope_scaling.original_max_seq_len": 16,
    }
    config = parse_config(MINIMAL, overrides)
    assert (config.train.steps, config.run.name, config.data.path) == (50, "123", "folder/store")
    assert (config.data.source, config.optimizer.betas, config.optimizer.eps) == (None, (0.5, 0.6), 1e-7)
    assert config.model.rope_scaling and config.model.rope_scaling.factor == 8
    section = {"model.rope_scaling": config.model.rope_scaling}
    assert parse_config(MINIMAL, section).model == config.model


def test_a_python_value_that_nothing_takes_is_refused_under_its_name():
    assert only_problem_of(overrides={"train.steps": 3j}) == (
        'train.steps is "3j" (override train.steps): it must be a whole number of at least 1, or null'
    )


def test_the_last_override_wins():
    assert parse_config(MINIMAL, ["train.steps=1", "train.steps=2"]).train.steps == 2


# ------------------------------------------------------------------------------------------------- unknown names


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("train.stepz", "train.steps"),
        ("steps", "train.steps"),
        ("lr", "optimizer.learning_rate"),
        ("optimizer.lr", "optimizer.learning_rate"),
        ("trian.steps", "train.steps"),
        ("model.seq_len", "data.seq_len"),
        ("model.rope_scaling.facter", "model.rope_scaling.factor"),
        ("optimiser", "optimizer"),
        ("batch_size", "global_batch_size"),
        ("--train.steps", "train.steps"),
    ],
)
def test_an_unknown_override_names_the_nearest(given, meant):
    problem = only_problem_of(overrides=[f"{given}=3"])
    assert problem.startswith(f"{given} is not a field (override): did you mean ")
    assert meant in problem


def test_an_unknown_key_of_a_file_names_its_line_and_the_nearest():
    text = MINIMAL + "optimizer:\n  learning_rat: 1\n"
    assert only_problem_of(text, origin="a.yaml") == (
        "optimizer.learning_rat is not a field (a.yaml line 8): did you mean optimizer.learning_rate?"
    )


def test_an_unknown_section_is_one_problem():
    assert only_problem_of(MINIMAL + "chekpoint: {every_steps: 3}") == (
        "chekpoint is not a field (the config line 7): did you mean checkpoint?"
    )


def test_a_name_like_no_other_is_answered_with_the_names_there_are():
    assert only_problem_of(overrides=["train.zzz=1"]) == (
        "train.zzz is not a field (override): "
        "the fields of train are train.steps, train.epochs, train.global_batch_size, train.micro_batch_size"
    )
    assert "the sections are task, run, cluster, model" in only_problem_of(overrides=["zzz=1"])
    assert "the sections are task, run, cluster, model" in only_problem_of(overrides=["train.steps.zzz=1"])
    assert only_problem_of(overrides=["=1"]).startswith("an override without a name is not a field")


def test_a_dotted_key_in_a_file_is_told_how_to_nest():
    assert only_problem_of(MINIMAL + "train.steps: 3") == (
        "train.steps is one word here (the config line 7): in a file, write `steps:` below `train:`"
    )


# ------------------------------------------------------------------------------------------------- wrong values


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=abc", 'train.steps is "abc" (override train.steps): it must be a whole number of at least 1'),
        ("train.steps=0", "train.steps is 0 (override train.steps): it must be a whole number of at least 1"),
        ("train.steps=2.5", "train.steps is 2.5 (override train.steps): it must be a whole number of at least 1"),
        ("train.steps=true", "train.steps is true (override train.steps): it must be a whole number of at least 1"),
        ('train.steps="3"', 'train.steps is "3" (override train.steps): it must be a whole number of at least 1'),
        ("train.steps=", "train.steps is missing: give a whole number of at least 1, or train.epochs"),
        ("train.steps={a: 1}", "train.steps is a section here (override train.steps): it must be a whole number of"),
        (
            "cluster.ends_at=2026-13-45T99:99Z",
            'cluster.ends_at is "2026-13-45T99:99Z" (override cluster.ends_at): it must be UTC, as 2026-12-01T11:30Z',
        ),
        ("cluster.ends_at=2026-12-01", 'cluster.ends_at is "2026-12-01" (override cluster.ends_at): it must be UTC'),
        ("train=3", "train is '3' (override train): it must be a section with steps, epochs, global_batch_size, "),
        ("train=[3]", "train is a list (override train): it must be a section with"),
        ("train=", "train is empty (override train): it must be a section with"),
        ("model.rope_scaling=3", "model.rope_scaling is '3' (override model.rope_scaling): it must be a section with"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate is Infinity (override optimizer.learning_rate): it"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate is NaN (override optimizer.learning_rate): it must"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate is 0 (override optimizer.learning_rate): it must be a"),
        ("optimizer.betas=[0.9]", "optimizer.betas is [0.9] (override optimizer.betas): it must be a list of 2, each"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas is [0.9, 1.0] (override optimizer.betas): it must be a list "),
        ("sample.prompts=text", 'sample.prompts is "text" (override sample.prompts): it must be a list, each text'),
        ("sample.prompts=[{a: b}]", "sample.prompts is [{}] (override sample.prompts): it must be a list, each text"),
        ("sample.prompts=&a [*a]", "sample.prompts is [{}] (override sample.prompts): it must be a list, each text"),
        ("run.name=Two Words", "run.name is \"Two Words\" (override run.name): it must be 1 to 63 of a-z, 0-9, '.', "),
        ("data.path=", "data.path is missing: give a folder or a URL, or data.source or data.mixture"),
        (
            "data.mixture=[{store: a, weight: 0}]",
            "data.mixture[0].weight is 0 (override data.mixture): it must be a number above 0",
        ),
        (
            "data.mixture=[{store: a}]",
            "data.mixture[0].weight is missing (override data.mixture): give a number above 0",
        ),
        (
            "data.mixture=[{store: a, weight: 1, wieght: 2}]",
            "data.mixture[0].wieght is not a field (override data.mixture): there must be a section with store, "
            "weight, identity",
        ),
        (
            "data.mixture=[a]",
            'data.mixture[0] is "a" (override data.mixture): it must be a section with store, weight, identity',
        ),
        (
            "data.mixture=[{store: a, weight: 1, weight: 2}]",
            "data.mixture[0].weight is given twice (override data.mixture, first on line 1): keep one of them",
        ),
        (
            "data.stages=[{from_step: 0, weights: {a: 1}}]",
            "data.stages[0].from_step is 0 (override data.stages): it must be a whole number of at least 1",
        ),
        (
            "data.stages=[{from_step: 2, weights: {a: -1}}]",
            "data.stages[0].weights.a is -1 (override data.stages): it must be a number of at least 0",
        ),
        (
            "data.stages=[{from_step: 2, weights: [1]}]",
            'data.stages[0].weights is ["1"] (override data.stages): it must be names, each with a number of at least',
        ),
        ("engine.kind=nativ", 'engine.kind is "nativ" (override engine.kind): it must be one of native, nxd; did you'),
        ("data.heldout_fraction=1", "data.heldout_fraction is 1 (override data.heldout_fraction): it must be a numbe"),
        ("train.steps=[1", "override train.steps line 1, column 3 is not valid YAML: "),
        ("train.steps=" + "9" * 5000, "train.steps is "),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_problem_with_field_value_and_rule(override, message):
    assert only_problem_of(overrides=[override]).startswith(message)


def test_an_override_needs_an_equals_sign():
    assert only_problem_of(overrides=["train.steps"]) == ("override 'train.steps' has no '=': write train.steps=VALUE")


def test_overrides_in_one_text_are_refused():
    assert only_problem_of(overrides="train.steps=3") == (
        "overrides is the text 'train.steps=3': it must be a list such as ['train.steps=3']"
    )


def test_all_problems_come_at_once():
    problems = problems_of(
        MINIMAL.replace("seq_len: 16", "seq_len: x"), ["train.stepz=3", "nope", "run.name=A", "optimizer.eps=-1"]
    )
    assert [problem.split(" ")[0] for problem in problems] == [
        "override", "train.stepz", "run.name", "data.seq_len", "optimizer.eps",
    ]  # fmt: skip


def test_missing_fields_and_sections_say_what_to_give():
    assert problems_of("run: {}\ndata: {seq_len: 3}\nmodel: 3\n") == [
        "model is '3' (the config line 3): it must be a section with family, vocab_size, hidden_size, num_layers, "
        "num_heads, num_kv_heads, head_dim, ffn_size, max_seq_len, rope_theta, rope_scaling, norm_eps, "
        "embeddings, init_std, init, init_identity, add_tokens",
        "data.path is missing: give a folder or a URL, or data.source or data.mixture",
        "run.name is missing: give 1 to 63 of a-z, 0-9, '.', '_' and '-', a letter or digit first",
        "train is missing: it must hold train.global_batch_size",
    ]


# ------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the config is empty: it must hold run, model, data, train"),
        ("# only a comment\n", "the config is empty: it must hold run, model, data, train"),
        ("[1, 2]", "the config is a list: it must be sections such as `train:` with fields below them"),
        ("a: b: c", "the config line 1, column 5 is not valid YAML: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2", "the config line 2, column 1 is not valid YAML: expected a single document in the stream"),
        ("a: \x07", "the config is not valid YAML: unacceptable character"),
    ],
)
def test_a_text_that_is_no_config_is_one_problem(text, message):
    assert only_problem_of(text).startswith(message)


def test_a_key_given_twice_is_refused():
    assert only_problem_of(MINIMAL + "run: {name: other}") == (
        "run is given twice (the config line 7, first on line 2): keep one of them"
    )
    assert only_problem_of(MINIMAL + "optimizer:\n  eps: 1\n  eps: 2") == (
        "optimizer.eps is given twice (the config line 9, first on line 8): keep one of them"
    )


def test_a_key_that_is_no_name_is_refused():
    assert only_problem_of(MINIMAL + "? [a, b]\n: 3\n") == (
        "the config line 7 has a list for a key: a key must be the name of a field"
    )


def test_a_path_is_read_relative_to_the_base_folder(tmp_path):
    (tmp_path / "job.yaml").write_text(MINIMAL)
    assert load_config("job.yaml", ["train.steps=3"], base_folder=tmp_path).train.steps == 3
    assert load_config(tmp_path / "job.yaml").train.steps == 10


def test_a_bare_name_is_a_preset_of_the_working_folder_before_the_checkout(tmp_path, monkeypatch):
    (tmp_path / "jobs/configs").mkdir(parents=True)
    (tmp_path / "jobs/configs/mine.yaml").write_text(MINIMAL)
    (tmp_path / "jobs/configs/quickstart.yaml").write_text(MINIMAL)
    monkeypatch.chdir(tmp_path)
    assert load_config("mine").run.name == "tiny"
    assert load_config("quickstart").run.name == "tiny"
    assert load_config("llama3-8b").run.name == "llama3-8b"
    assert {"mine", "quickstart", "llama3-8b"} <= set(preset_names())


def test_a_missing_file_lists_the_presets(tmp_path):
    with pytest.raises(
        ConfigError, match=r"there is no preset 'quickstrt': did you mean the preset quickstart\? Give the p"
    ):
        load_config("quickstrt")
    with pytest.raises(ConfigError) as caught:
        load_config("missing.yaml", base_folder=tmp_path)
    assert str(caught.value).startswith(
        f"there is no job file 'missing.yaml' in {tmp_path}: Give the path of a YAML file"
    )
    assert "quickstart" in str(caught.value)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "job.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        load_config(tmp_path / "job.yaml")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_refused(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(MINIMAL)
    path.chmod(0)
    with pytest.raises(ConfigError, match="Permission denied"):
        load_config(path)


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.yaml"))
        for path, kind in [
            (tmp_path / "pipe.yaml", "a pipe"),
            (tmp_path / "socket.yaml", "a socket"),
            ("/dev/zero", "a device"),
            (tmp_path, "a folder"),
        ]:
            with pytest.raises(ConfigError, match=f"cannot be read as text: .*it is {kind}, and only plain files"):
                load_config(path)
    (tmp_path / "large.yaml").write_bytes(bytes(2**18 + 1))
    with pytest.raises(ConfigError, match="more than 262,144 bytes"):
        load_config(tmp_path / "large.yaml")


# ------------------------------------------------------------------------------------------------- hostile text

nested: list = []
for _ in range(100_000):
    nested = [nested]
endless: list = []
endless.append(endless)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (MINIMAL + "sample: {prompts: " + "[" * 5000 + "]" * 5000 + "}", (), "the config is nested far deeper"),
        ("[" * 5000, (), "the config is nested far deeper"),
        ("- " * 5000, (), "the config is nested far deeper"),
        (MINIMAL, ["train.steps=" + "{" * 5000], "override train.steps is nested far deeper"),
        ("a" * 100_000, (), "the config has 100,000 characters: a config has at most 65,536"),
        (MINIMAL, {"sample.prompts": nested}, "sample.prompts is "),
        (MINIMAL, {"sample.prompts": endless}, "sample.prompts is "),
        (MINIMAL, {"tracking.experiment": "a\ud800b"}, r"tracking.experiment is 'a\ud800b' (override tracking.exp"),
        (MINIMAL, ["run.root=/tmp/\udcfcn"], r"run.root is '/tmp/\udcfcn' (override run.root), which is not"),
        (MINIMAL, {"sample.prompts": ["fine", "\udcff"]}, r"sample.prompts is '\udcff' (override sample.prompts), w"),
        (MINIMAL + 'tracking: {experiment: "\\ud800"}', (), r"tracking.experiment is '\ud800' (the config line 7), wh"),
        (MINIMAL, {"data.path": "a\0b"}, r"data.path is 'a\x00b' (override data.path), which is not valid text"),
        (MINIMAL, ["a" + "." * 100_000 + "=1"], "a....."),
    ],
)  # fmt: skip
def test_text_that_no_config_holds_is_one_problem_at_once(text, overrides, message):
    assert only_problem_of(text, overrides).startswith(message)


def test_a_character_that_json_escapes_as_two_is_one():
    for text, overrides in [
        (MINIMAL, {"sample.prompts": ["𐀀 a", "😀"]}),
        (MINIMAL + 'sample: {prompts: ["\\ud800\\udc00 a", "\\ud83d\\ude00"]}', ()),
    ]:
        assert parse_config(text, overrides).sample.prompts == ("𐀀 a", "😀")


DUMPED = dump_yaml(parse_config(MINIMAL))
HOSTILE = st.sampled_from(
    ["[", "{", "&a ", "*a", "? ", "- ", "\0", "\ud800", "!!python/name:os", "<<: ", "...", "---", "\t"]
)


@settings(max_examples=200, deadline=None)
@given(
    cuts=st.lists(st.tuples(st.integers(0, len(DUMPED)), st.integers(0, 6), HOSTILE | st.text(max_size=4)), max_size=4),
    override=st.none() | st.tuples(st.sampled_from(["train.steps", "model", "sample.prompts", "data.path", "x"]),
                                   HOSTILE | st.text(max_size=6)),
)  # fmt: skip
def test_a_mutated_config_is_read_or_refused_in_words(cuts, override):
    text = DUMPED
    for position, length, inserted in cuts:
        text = text[:position] + inserted + text[position + length :]
    try:
        config = parse_config(text, dict([override]) if override else ())
    except ConfigError as error:
        assert error.problems and all(problem.strip() for problem in error.problems)
    else:
        assert parse_config(dump_yaml(config)) == config


# ------------------------------------------------------------------------------------------------- building on another


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write("a/b.yaml", text) below a folder that is the current one."""
    monkeypatch.chdir(tmp_path)

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def test_a_file_is_laid_over_what_it_extends_field_by_field(write):
    write("base.yaml", MINIMAL + "optimizer: {learning_rate: 1e-3, betas: [0.8, 0.9]}\nsample: {prompts: [a, b]}\n")
    write("mine.yaml", "extends: base.yaml\ntrain: {steps: 20}\noptimizer: {betas: [0.5, 0.6]}\nsample: {prompts: [c]}")
    base, config = load_config("base.yaml"), load_config("mine.yaml", ["run.name=mine", "train={micro_batch_size: 2}"])
    assert (config.train.steps, config.train.global_batch_size, config.train.micro_batch_size) == (20, 4, 2)
    assert (config.optimizer.learning_rate, config.optimizer.betas) == (1e-3, (0.5, 0.6))
    assert (config.run.name, config.sample.prompts, config.model) == ("mine", ("c",), base.model)


def test_a_preset_can_be_extended_and_what_is_recorded_stands_alone(write):
    write("mine.yaml", "extends: llama3-8b\nrun: {name: mine}\nmodel: {rope_scaling: {factor: 16}, num_layers: 4}\n")
    config, preset = load_config("mine.yaml"), load_config("llama3-8b")
    assert config.model.rope_scaling == preset.model.rope_scaling.model_copy(update={"factor": 16.0})
    assert (config.model.num_layers, config.train, config.run.name) == (4, preset.train, "mine")
    assert "extends" not in dump_yaml(config) and parse_config(dump_yaml(config)) == config


def test_paths_begin_at_the_file_that_names_them(write):
    write("team/base.yaml", "extends: parts/sizes.yaml\nrun: {name: base}\n")
    write("team/parts/sizes.yaml", MINIMAL)
    write("team/user/mine.yaml", "extends: ../base.yaml\nmodel: {preset: ../parts/sizes.yaml, num_layers: 3}\n")
    config = load_config("team/user/mine.yaml")
    assert (config.run.name, config.train.steps, config.model.num_layers) == ("base", 10, 3)
    assert parse_config("extends: team/base.yaml").run.name == "base"


def test_a_model_by_a_presets_name_is_enough_beside_text_of_ones_own():
    text = (
        "run: {name: a}\nmodel: {preset: llama3-1b}\ndata: {source: my/text}\ntrain: {steps: 9, global_batch_size: 8}"
    )
    config = parse_config(text)
    assert config.model == load_config("llama3-1b").model
    assert config == parse_config(dump_yaml(config)) and "preset" not in dump_yaml(config)


def test_a_presets_model_takes_the_place_of_the_one_below_it(write):
    write("mine.yaml", "extends: llama3-8b\nmodel: {num_layers: 2, preset: qwen3-8b}\n")
    qwen = load_config("qwen3-8b").model
    assert load_config("mine.yaml").model == qwen.model_copy(update={"num_layers": 2})
    for overrides in (
        ["model.num_layers=2", "model.preset=qwen3-8b"],
        ["model={preset: qwen3-8b, num_layers: 2}"],
        {"model.preset": "qwen3-8b", "model.num_layers": 2},
    ):
        assert load_config("llama3-8b", overrides).model == qwen.model_copy(update={"num_layers": 2}), overrides


@pytest.mark.parametrize(
    ("data", "path"),
    [
        ("source: python-stdlib", "runs/data/python-stdlib"),
        ("source: /texts/my novels/", "runs/data/my novels"),
        ("source: s3://bucket/texts", "runs/data/texts"),
        ("source: s3://bucket/web/*.jsonl.zst", "runs/data/web"),
        ("source: '/web/**/part-[0-9].txt'", "runs/data/web"),
        ("source: ..", "runs/data/tiny"),
        ("source: '*.txt'", "runs/data/tiny"),
        ("source: a, path: b", "b"),
    ],
)
def test_runs_share_the_store_of_a_source(data, path):
    text = MINIMAL.replace("path: store", data)
    assert parse_config(text).data.path == path
    assert parse_config(text, ["run.root=s3://b/runs/"]).data.path == path.replace("runs/", "s3://b/runs/")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "extends: a.yaml"}, "extends is 'a.yaml' (a.yaml line 1): it is being read already (a.yaml → a.yaml)"),
        (
            {"a": "run: {name: a}\nextends: b.yaml", "b": "extends: c.yaml", "c": "extends: ./a.yaml"},
            "extends is './a.yaml' (c.yaml line 1): it is being read already (a.yaml → b.yaml → c.yaml → a.yaml)",
        ),
        (
            {"a": MINIMAL.replace("{vocab", "{preset: a.yaml, vocab")},
            "model.preset is 'a.yaml' (a.yaml line 3): it is being read already (a.yaml → a.yaml)",
        ),
        ({"a": "extends: quikstart"}, "extends is 'quikstart' (a.yaml line 1): there is no preset 'quikstart': did"),
        ({"a": "extends: b.yaml"}, "extends is 'b.yaml' (a.yaml line 1): there is no job file 'b.yaml' in "),
        ({"a": "extends: [b]"}, "extends is a list (a.yaml line 1): it must be the job file to build on, a preset's"),
        ({"a": "extends:"}, "extends is empty (a.yaml line 1): it must be the job file to build on, a preset's name"),
        ({"a": "extends: b.yaml", "b": "run: [1"}, "b.yaml line 1, column 8 is not valid YAML"),
        ({"a": "extends: b.yaml", "b": ""}, "b.yaml is empty: it must hold run, model, data, train"),
        ({"a": "extends: quickstart\nmodel: {preset: nil}"}, "model.preset is 'nil' (a.yaml line 2): there is no"),
        ({"a": "extends: quickstart\nextends: b.yaml"}, "extends is given twice (a.yaml line 2, first on line 1)"),
        ({"a": "extends: b.yaml", "b": MINIMAL + "zzz: 1"}, "zzz is not a field (b.yaml line 7): the sections"),
        ({"a": "extends: b.yaml", "b": MINIMAL.replace("steps: 10", "steps: x")}, 'train.steps is "x" (b.yaml line 6)'),
    ],
)  # fmt: skip
def test_what_cannot_be_built_on_is_one_problem(write, files, message):
    for name, text in files.items():
        write(f"{name}.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_config("a.yaml")
    assert len(caught.value.problems) == 1 and caught.value.problems[0].startswith(message), caught.value.problems


def test_an_unknown_preset_in_an_override_is_one_problem():
    assert only_problem_of(overrides=["model.preset=llama3-9b"]).startswith(
        "model.preset is 'llama3-9b' (override model.preset): there is no preset 'llama3-9b': did you mean the preset "
    )
    assert "did you mean model.preset?" in only_problem_of(overrides=["model.prest=llama3-8b"])


# ------------------------------------------------------------------------------------------------- writing

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
NUMBERS = st.floats(min_value=1e-300, max_value=1e300)


@settings(max_examples=60, deadline=None)
@given(prompts=st.lists(TEXT | st.sampled_from(["", "null", "~", "no", "1e3", "a: b", "- x", "'", '"', "\n", "\t"])),
       path=TEXT, source=st.none() | TEXT, rate=NUMBERS,
       name=st.from_regex(r"[a-z0-9][a-z0-9._-]{0,9}", fullmatch=True))  # fmt: skip
def test_dumped_text_reads_back_as_the_same_config(prompts, path, source, rate, name):
    values = parse_config(MINIMAL).model_dump()
    values["sample"]["prompts"] = tuple(prompts)
    values["data"] |= {"path": path, "source": source}
    values["optimizer"]["learning_rate"] = rate
    values["run"]["name"] = name
    config = Config.model_validate(values)
    assert parse_config(dump_yaml(config)) == config


# ------------------------------------------------------------------------------------------------- tasks


def test_a_task_says_what_it_learns_from_unless_the_file_does():
    settled = parse_config("task: sft\n" + MINIMAL)
    assert (settled.data.records, settled.data.packing) == ("chats", "documents")
    said = parse_config("task: sft\n" + MINIMAL, ["data.records=completions"])
    assert (said.data.records, said.data.packing) == ("completions", "documents")
    plain = parse_config(MINIMAL)
    assert (plain.task, plain.data.records, plain.data.packing) == ("pretraining", "text", "stream")
    assert parse_config(dump_yaml(settled)) == settled


def test_epochs_stand_in_place_of_steps():
    config = parse_config(MINIMAL, ["train.steps=null", "train.epochs=2.5"])
    assert (config.train.steps, config.train.epochs) == (None, 2.5)
    assert brief(config).startswith("# 2.5 epochs in steps of ")


def test_columns_are_a_name_or_a_list_of_names():
    config = parse_config(MINIMAL, ["data.fields={prompt: [instruction, input], completion: output}"])
    assert config.data.fields is not None
    assert (config.data.fields.prompt, config.data.fields.completion) == (("instruction", "input"), ("output",))
    assert parse_config(dump_yaml(config)) == config
    with pytest.raises(ConfigError, match=r"data\.fields\.answer is not a field"):
        parse_config(MINIMAL, ["data.fields={answer: a}"])
