"""The command push and `push_to_hub: true`: over HTTP to a small Hub, and back, with the package and without."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from hub_clients import Client, ClientError, fresh_environment
from hub_server import HubServer
from huggingface_hub import constants
from safetensors.torch import load, load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from vanilla_transformer.training.errors import RecipeError
from vanilla_transformer.training.publishing.hub import HubError, push_checkpoint, push_run, stage
from vanilla_transformer.training.settings.arguments import TrainingArguments
from vanilla_transformer.training.settings.recipe import public
from vanilla_transformer.training.translator import translate


ROOT = Path(__file__).parents[1]
OWNER, OTHER = "hf_owner", "hf_other"  # tokens of the users NAME and OTHER
RECIPE = """
dataset: phrasebook:en-de
phrasebook_size: 2000
max_eval_samples: 40
vocab_size: 400
d_model: 64
encoder_layers: 1
decoder_layers: 1
encoder_attention_heads: 2
decoder_attention_heads: 2
encoder_ffn_dim: 128
decoder_ffn_dim: 128
dropout: 0.0
per_device_train_batch_tokens: 400
learning_rate: 0.005
warmup_steps: 30
max_steps: 200
eval_strategy: steps
eval_steps: 100
save_strategy: steps
save_steps: 100
num_beams: 3
max_new_tokens: 20
push_to_hub: true
hub_always_push: true
hub_model_id: NAME/trained
"""
CODE = {path.name for path in (ROOT / "vanilla_transformer").glob("*.py")} - {"__init__.py"}
# A bilingual tokenizer is a file of JSON. That of many languages brings its code (test_languages.py).
CODE -= {f"tokenization_{name}.py" for name in ("vanilla_transformer", "languages", "units")}
MODEL = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
DOCUMENTS = {"README.md", "metrics.json", "loss_curve.png", "recipe.yaml"}
EXAMPLES = ["3 days ago", "Friday, March 13, 2026", "1,234.50 euros", "12 hours", "Norway, Peru, and Japan"]

PUSH = """
from vanilla_transformer_commands.main import run
run("push", argv)
"""
TRAIN = """
from vanilla_transformer.training.program import run_program
from vanilla_transformer.training.train import main
run_program(main, argv)
"""
# The code of a user with the package, and of one without it.
WITH_PACKAGE = "import vanilla_transformer\ntrust = {}\n"
WITHOUT_PACKAGE = "import sys\nassert 'vanilla_transformer' not in sys.modules\ntrust = {'trust_remote_code': True}\n"
LOAD = """
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer, pipeline

trust["revision"] = revision
config = AutoConfig.from_pretrained(name, **trust)
network = AutoModel.from_pretrained(name, **trust)
model = AutoModelForSeq2SeqLM.from_pretrained(name, **trust).eval()
tokenizer = AutoTokenizer.from_pretrained(name, **trust)
"""
# Whose `generate()` has found the translations, and by which engine.
TRANSLATE = """
ids = [model.generate(**tokenizer([text], return_tensors="pt"))[0] for text in texts]
found_by = [type(model).generate.__module__, model.last_engine.name]
"""
ANSWER = """
pipes = [pipeline("translation", model=name, device="cpu", **trust), pipeline(model=name, device="cpu", **trust)]
answer = {
    "classes": [f"{type(part).__module__}.{type(part).__name__}" for part in (config, network, model, *pipes)],
    "translations": tokenizer.batch_decode(ids, skip_special_tokens=True),
    "pipelines": [[record["translation_text"] for record in pipe(texts)] for pipe in pipes],
    "found_by": found_by,
    "network": all(
        weight.equal(dict(model.model.named_parameters())[name]) for name, weight in network.named_parameters()
    ),
}
"""
WEIGHTS = "\nanswer = {name: weight.flatten().tolist() for name, weight in model.named_parameters()}\n"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub"), {OWNER: "NAME", OTHER: "OTHER"}) as server:
        yield server
        assert not server.failures


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """A user with everything that this project needs."""
    with Client(sys.executable, hub.url, tmp_path_factory.mktemp("client")) as process:
        yield process


@pytest.fixture(scope="module")
def stranger(hub, tmp_path_factory):
    """A user with only torch, transformers, tokenizers and their requirements."""
    python = fresh_environment(tmp_path_factory.mktemp("fresh"), "torch", "transformers", "tokenizers")
    with Client(python, hub.url, tmp_path_factory.mktemp("stranger")) as process:
        yield process


@pytest.fixture(scope="module")
def trained(hub, client, tmp_path_factory) -> Path:
    """The folder of a run that pushed its checkpoints and, at its end, its model to NAME/trained."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "recipe.yaml").write_text(RECIPE)
    printed = client.run(TRAIN, OWNER, argv=[str(folder / "recipe.yaml"), "--output_dir", str(folder / "run")])
    assert f"{hub.url}/NAME/trained, revision {hub.history('NAME/trained')[0].sha}" in printed
    return folder / "run"


@pytest.fixture(scope="module")
def push(client):
    """Runs the command as from the command line."""

    def run(*argv, token=OWNER) -> str:
        return client.run(PUSH, token, argv=list(map(str, argv)))

    return run


@pytest.fixture(scope="module")
def pushed(trained, push, hub) -> str:
    """The name of a repository that the command has created."""
    said = push(trained, "NAME/mine")
    assert f"{trained} is at {hub.url}/NAME/mine, revision {hub.history('NAME/mine')[0].sha}" in said
    return "NAME/mine"


@pytest.fixture(scope="module")
def expected(trained) -> list[str]:
    """The translations of the examples by the run's own model."""
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(trained).eval(), AutoTokenizer.from_pretrained(trained)
    translations = translate(model, tokenizer, EXAMPLES)
    assert len(set(translations)) > 2
    return translations


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """A copy of a run's folder that a test may change."""
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*", "runs"))
    return tmp_path / "run"


def change_weights(run: Path, factor: float) -> None:
    """Scales the weights. Each test needs its own factor: the Hub does not request files that it already has."""
    weights = load_file(run / "model.safetensors")
    save_file(
        {name: weight * factor for name, weight in weights.items()},
        run / "model.safetensors",
        metadata={"format": "pt"},
    )


class TestPushing:
    def test_a_run_goes_up_in_one_commit_with_code_and_documents_and_nothing_else(self, trained, pushed, hub):
        last, first = hub.history(pushed)
        assert set(first.files) == {".gitattributes"}
        assert set(last.files) == MODEL | DOCUMENTS | CODE | {".gitattributes"}
        files = hub.files(pushed)
        for name in ("metrics.json", "loss_curve.png", "generation_config.json", "tokenizer.json"):
            assert files[name] == (trained / name).read_bytes(), name
        weights = load(files["model.safetensors"])
        stored = load_file(trained / "model.safetensors")
        assert set(weights) == set(stored)
        assert all(torch.equal(weights[name], stored[name]) for name in stored)
        for name in CODE:
            assert files[name] == (ROOT / "vanilla_transformer" / name).read_bytes()

    def test_config_and_card_speak_of_the_repository(self, trained, pushed, hub):
        files = hub.files(pushed)
        config, before = json.loads(files["config.json"]), json.loads((trained / "config.json").read_text())
        added = {name: config.pop(name) for name in ("auto_map", "custom_pipelines")}
        assert config == before
        assert set(added["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForSeq2SeqLM"}
        assert set(added["custom_pipelines"]) == {"translation"}
        card = files["README.md"].decode()
        assert card.count('"NAME/mine"') == 5
        assert card.replace('"NAME/mine"', "") == re.sub(
            rf'"(NAME/trained|{re.escape(str(trained))})"', "", (trained / "README.md").read_text()
        )

    def test_nothing_tells_of_the_folders_of_whoever_has_made_it(self, trained, pushed, hub):
        """The pushed recipe holds their names without folders; otherwise it is the run's recipe."""
        texts = {name: data for name, data in hub.files(pushed).items() if name not in ("model.safetensors", *CODE)}
        assert not [name for name, data in texts.items() if str(trained.parent).encode() in data]
        own = yaml.safe_load((trained / "recipe.yaml").read_text())
        assert own["output_dir"] == str(trained)
        assert yaml.safe_load(texts["recipe.yaml"]) == own | {"output_dir": "run"}
        (shown,) = re.findall(r"```yaml\n(.*?)```", texts["README.md"].decode(), re.DOTALL)
        assert shown.encode() == texts["recipe.yaml"]
        assert b"warmup_steps: 30\n" in texts["recipe.yaml"]  # as it was given, and not 30.0

    def test_a_run_pushes_its_checkpoints_without_pickles_and_then_what_the_command_pushes(self, trained, pushed, hub):
        history = hub.history("NAME/trained")
        titles = ["End of training", "Training in progress, update 200", "Training in progress, update 100"]
        assert [commit.title for commit in history] == [*titles, "initial commit"]
        for commit in history[1:3]:
            assert set(commit.files) == MODEL | CODE | {".gitattributes"}
        own, later = hub.files("NAME/trained"), hub.files(pushed)
        own["README.md"] = own["README.md"].replace(b"NAME/trained", b"NAME/mine")
        later["README.md"] = later["README.md"].replace(b"NAME/trained", b"NAME/mine")
        assert own == later
        middle = load(hub.files("NAME/trained", history[2].sha)["model.safetensors"])
        stored = load_file(trained / "checkpoint-100" / "model.safetensors")
        assert all(torch.equal(middle[name], stored[name]) for name in stored)

    def test_the_runs_folder_and_its_checkpoints_hold_no_code_and_no_pickle_of_arguments(self, trained):
        assert not list(trained.rglob("*.py"))
        assert not (trained / "training_args.bin").exists()
        for config in trained.rglob("config.json"):
            assert not {"auto_map", "custom_pipelines"} & set(json.loads(config.read_text()))

    def test_a_run_of_adapters_pushes_the_merged_model_at_its_end_and_no_adapters_on_the_way(
        self, trained, client, hub, tmp_path
    ):
        options = {
            "model": trained, "lora_rank": 2, "dataset": "phrasebook:en-de", "phrasebook_size": 200,
            "max_eval_samples": 10, "max_steps": 4, "warmup_steps": 2, "learning_rate": 0.01, "eval_strategy": "steps",
            "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "output_dir": tmp_path / "adapted",
            "push_to_hub": "true", "hub_model_id": "NAME/adapted",
        }  # fmt: skip
        client.run(TRAIN, OWNER, argv=[str(word) for name, value in options.items() for word in (f"--{name}", value)])
        assert [commit.title for commit in hub.history("NAME/adapted")] == ["End of training", "initial commit"]
        files = hub.files("NAME/adapted")
        assert set(files) == MODEL | DOCUMENTS | CODE | {".gitattributes"}
        weights, base = load(files["model.safetensors"]), load_file(trained / "model.safetensors")
        assert weights.keys() == base.keys()
        assert any(not torch.equal(weights[name], base[name]) for name in base)
        assert f"trained further from `{trained.name}`" in files["README.md"].decode()
        assert "base_model" not in files["README.md"].decode()  # a name that the Hub would take for one of its own

    def test_a_checkpoint_that_cannot_be_pushed_ends_no_run(self, trained, monkeypatch, caplog):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        push_checkpoint(trained / "checkpoint-100", "NAME/trained", None, "Training in progress").result()
        assert re.search(r"checkpoint-100 was not pushed: the connection to .* The run continues", caplog.text)

    def test_staging_leaves_the_random_numbers_and_the_classes_as_they_were(self, trained, tmp_path):
        state = torch.get_rng_state()
        stage(trained / "checkpoint-100", tmp_path)
        assert torch.equal(torch.get_rng_state(), state)
        model = AutoModelForSeq2SeqLM.from_pretrained(trained)
        model.save_pretrained(tmp_path / "again")
        assert not list((tmp_path / "again").glob("*.py"))


class TestLoading:
    @pytest.mark.parametrize("trust", ["{}", "{'trust_remote_code': True}"], ids=["no trust", "trust"])
    def test_with_the_package_its_own_code_runs_whether_the_repositorys_is_trusted_or_not(
        self, trust, pushed, client, expected
    ):
        program = WITH_PACKAGE.replace("{}", trust) + LOAD + TRANSLATE + ANSWER
        answer = client.run(program, name=pushed, revision=None, texts=EXAMPLES)
        assert answer["translations"] == expected
        assert answer["pipelines"] == [expected, expected]
        assert answer["network"]
        assert answer["found_by"][0] == "vanilla_transformer.generation_vanilla_transformer"
        assert answer["found_by"][1] in ("packed", "compiled")  # compiled as soon as the compiler is done
        assert all(name.startswith("vanilla_transformer.") for name in answer["classes"])

    def test_only_transformers_and_what_it_requires_loads_it_and_translates_as_the_run_did(
        self, pushed, stranger, expected, trained, hub
    ):
        answer = stranger.run(WITHOUT_PACKAGE + LOAD + TRANSLATE + ANSWER, name=pushed, revision=None, texts=EXAMPLES)
        assert answer["translations"] == expected
        assert answer["pipelines"] == [expected, expected]
        assert answer["network"]
        places = {name.rsplit(".", 2)[0] for name in answer["classes"]}
        assert places == {f"transformers_modules.NAME.mine.{hub.history(pushed)[0].sha}"}
        # The repository has no C++.
        assert answer["found_by"] == [f"{places.pop()}.generation_vanilla_transformer", "packed"]
        # What the run itself wrote down when it ended.
        metrics = json.loads((trained / "metrics.json").read_text())
        texts = [metrics["example_source"]]
        answer = stranger.run(WITHOUT_PACKAGE + LOAD + TRANSLATE + ANSWER, name=pushed, revision=None, texts=texts)
        assert answer["translations"] == [metrics["example_translation"]]

    def test_that_environment_has_nothing_else(self, stranger):
        code = """
answer = []
for name in names:
    try:
        __import__(name)
        answer.append(name)
    except ModuleNotFoundError:
        pass
"""
        absent = ["vanilla_transformer", "sacrebleu", "datasets", "evaluate", "accelerate", "babel", "peft", "pip"]
        assert stranger.run(code, names=[*absent, "torch", "tokenizers"]) == ["torch", "tokenizers"]

    def test_a_repository_without_trust_and_package_is_refused_by_transformers(self, pushed, stranger):
        code = "from transformers import AutoModelForSeq2SeqLM\n"
        code += "AutoModelForSeq2SeqLM.from_pretrained(name, trust_remote_code=False)"
        with pytest.raises(ClientError, match="trust_remote_code=True"):
            stranger.run(code, name=pushed)

    def test_the_examples_of_card_and_readme_run_with_the_package_and_without(self, pushed, client, stranger, hub):
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        for text in (hub.files(pushed)["README.md"].decode(), readme):
            blocks = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "NAME/mine" in block]
            assert ["trust_remote_code" in block for block in blocks] == [False, True]
            assert client.run(blocks[0]).strip()
            assert stranger.run(blocks[1]).strip()

    def test_a_checkpoint_pushed_on_the_way_loads_by_its_revision(self, trained, client, stranger, hub):
        middle = hub.history("NAME/trained")[2].sha
        stored = load_file(trained / "checkpoint-100" / "model.safetensors")
        for process, first in ((client, WITH_PACKAGE), (stranger, WITHOUT_PACKAGE)):
            weights = process.run(first + LOAD + WEIGHTS, name="NAME/trained", revision=middle)
            assert all(weights[name] == stored[name].flatten().tolist() for name in weights)


class TestRevisions:
    def test_each_push_is_a_revision_that_stays(self, trained, copy, push, client, hub):
        push(trained, "NAME/twice")
        change_weights(copy, 0.5)
        push(copy, "NAME/twice")
        second, first, _ = hub.history("NAME/twice")
        for revision, run in ((first.sha, trained), (second.sha, copy), (None, copy)):
            stored = load_file(run / "model.safetensors")
            weights = client.run(WITH_PACKAGE + LOAD + WEIGHTS, name="NAME/twice", revision=revision)
            assert all(weights[name] == stored[name].flatten().tolist() for name in weights)

    def test_a_branch_is_made_and_main_stays(self, trained, copy, push, hub):
        push(trained, "NAME/branches")
        main = hub.history("NAME/branches")
        change_weights(copy, 0.75)
        push(copy, "NAME/branches", "--revision", "louder")
        push(trained, "NAME/branches", "--revision", "louder")
        assert hub.history("NAME/branches") == main
        assert [commit.title for commit in hub.history("NAME/branches", "louder")] == [
            "Upload of a run", "Upload of a run", "Upload of a run", "initial commit",
        ]  # fmt: skip

    def test_what_is_there_already_makes_no_commit(self, pushed, trained, push, hub):
        before = hub.history(pushed)
        assert before[0].sha in push(trained, pushed)
        assert hub.history(pushed) == before


class TestPrivateRepositories:
    def test_only_its_owner_loads_it(self, trained, push, client, stranger, hub, expected):
        push(trained, "NAME/secret", "--private")
        assert hub.repositories["NAME/secret"].private
        load = WITH_PACKAGE + LOAD + TRANSLATE + ANSWER
        for token in (None, OTHER):
            with pytest.raises(ClientError, match=r"private repository|token having permission"):
                client.run(load, token, name="NAME/secret", revision=None, texts=EXAMPLES)
        assert client.run(load, OWNER, name="NAME/secret", revision=None, texts=EXAMPLES)["translations"] == expected
        load = load.replace(WITH_PACKAGE, WITHOUT_PACKAGE)
        assert stranger.run(load, OWNER, name="NAME/secret", revision=None, texts=EXAMPLES)["translations"] == expected

    def test_a_public_repository_is_not_taken_for_a_private_one(self, pushed, copy, push, hub):
        change_weights(copy, 1.0)
        before = hub.history(pushed)
        with pytest.raises(ClientError, match=r"error: NAME/mine exists and is public: make it private"):
            push(copy, pushed, "--private")
        assert hub.history(pushed) == before


class TestInterruptions:
    @pytest.mark.parametrize(
        ("settings", "factor", "message"),
        [
            ({"drop_upload": 1}, 0.7, r"error: the upload of a file to .* failed .*Request has expired.* push again"),
            ({"drop_commit": "before"}, 0.8, r"error: the connection to .* failed .* push again"),
        ],
        ids=["in the middle of a file", "in the commit"],
    )
    def test_the_old_revision_stays_whole_and_pushing_again_completes(
        self, settings, factor, message, trained, copy, push, hub, client
    ):
        push(trained, "NAME/broken")
        before = hub.history("NAME/broken")
        files = hub.files("NAME/broken")
        change_weights(copy, factor)
        for name, value in settings.items():
            setattr(hub, name, value)
        with pytest.raises(ClientError, match=message) as error:
            push(copy, "NAME/broken")
        assert "Traceback" not in str(error.value)
        assert hub.history("NAME/broken") == before
        assert hub.files("NAME/broken") == files
        stored = load_file(trained / "model.safetensors")
        weights = client.run(WITH_PACKAGE + LOAD + WEIGHTS, name="NAME/broken", revision=None)
        assert all(weights[name] == stored[name].flatten().tolist() for name in weights)

        push(copy, "NAME/broken")
        assert hub.history("NAME/broken")[1:] == before
        assert hub.files("NAME/broken")["model.safetensors"] != files["model.safetensors"]
        # As it was, for the other case.
        push(trained, "NAME/broken")

    def test_a_commit_whose_answer_is_lost_is_found_when_pushing_again(self, trained, push, hub):
        hub.drop_commit = "after"
        with pytest.raises(ClientError, match="push again"):
            push(trained, "NAME/unheard")
        made = hub.history("NAME/unheard")
        push(trained, "NAME/unheard")
        assert hub.history("NAME/unheard") == made
        assert set(made[0].files) == MODEL | DOCUMENTS | CODE | {".gitattributes"}


REFUSED = {
    "no token": (
        "NAME/new",
        None,
        r"no token for http.*: run `hf auth login`, or set .* HF_TOKEN",
    ),
    "a wrong token": ("NAME/new", "hf_old", r"refuses your token: run `hf auth login` again"),
    "the name of somebody else": (
        "OTHER/new",
        OWNER,
        r"your token may not write to OTHER/new: use a name in your own account",
    ),
    "no name": ("NAME/new/model", OWNER, r"'NAME/new/model' is not a valid repository name, NAME/MODEL"),
    "somebody else's repository": ("NAME/mine", OTHER, r"your token may not write to NAME/mine"),
}


@pytest.mark.parametrize(("name", "token", "message"), REFUSED.values(), ids=REFUSED)
def test_what_the_hub_refuses_is_told_in_one_line(name, token, message, trained, pushed, push, hub):
    before = {name: dict(repository.branches) for name, repository in hub.repositories.items()}
    with pytest.raises(ClientError) as error:
        push(trained, name, token=token)
    (line,) = [line for line in str(error.value).splitlines() if line.startswith("error: ")]
    assert re.search(message, line), line
    assert "Traceback" not in str(error.value)
    assert {name: dict(repository.branches) for name, repository in hub.repositories.items()} == before


@pytest.mark.parametrize(
    ("setting", "value"), [("ENDPOINT", "http://127.0.0.1:9"), ("HF_HUB_OFFLINE", True)], ids=["none there", "offline"]
)
def test_no_network_is_told_in_one_line(setting, value, trained, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", OWNER)
    monkeypatch.setattr(constants, setting, value)
    with pytest.raises(HubError, match=r"^the connection to http.* failed .*: push again when it is back\..*$"):
        push_run(trained, "NAME/new")


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda run: (run / name).write_text(text)


def edit(pattern: str, replacement: str) -> Callable[[Path], object]:
    """A function that changes the card."""

    def change(run: Path) -> None:
        text, count = re.subn(pattern, replacement, (run / "README.md").read_text(), count=1)
        assert count
        (run / "README.md").write_text(text)

    return change


WRONG = {
    "a run that has not ended": (
        lambda run: (run / "metrics.json").unlink(), r"not the folder of a finished run: it has no metrics\.json\.",
    ),
    "no card": (lambda run: (run / "README.md").unlink(), r"it has no README\.md"),
    "metrics of another kind": (write("metrics.json", "[]"), r"metrics\.json was not written by a run"),
    "metadata that is no YAML": (edit("metrics:\n", "metrics: [\n"), r"the metadata of .*README\.md cannot be read"),
    "metadata without scores": (edit("model-index:", "model:"), r"has no model-index"),
    "a better score": (edit("value: [0-9.]+", "value: 99.9"), r"bleu 99\.9 \(.*\) in model-index"),
    "weights that are cut off": (write("model.safetensors", "cut"), r"cannot load the model"),
    "no tokenizer": (lambda run: (run / "tokenizer.json").unlink(), r"cannot load the model .*tokenizer="),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_a_folder_that_is_no_whole_run_is_refused_before_anything_is_sent(change, message, copy, push, hub):
    change(copy)
    before = dict(hub.requests)
    with pytest.raises(ClientError) as error:
        push(copy, "NAME/new")
    (line,) = [line for line in str(error.value).splitlines() if line.startswith("error: ")]
    assert re.search(message, line), line
    assert "Traceback" not in str(error.value)
    assert dict(hub.requests) == before


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"hub_token": "hf_secret"}, "hub_token would be published in recipe.yaml"),
        ({"hub_strategy": "checkpoint"}, "hub_strategy=checkpoint would push the optimizer's state and other pickles"),
        ({"hub_strategy": "all_checkpoints"}, "hub_strategy=all_checkpoints would push"),
    ],
)
def test_a_recipe_does_not_publish_secrets_or_pickles(option, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        TrainingArguments(output_dir=str(tmp_path), **option)


PUBLIC = {
    "output_dir": ("/home/me/acme/runs/mine", "mine"),
    "data_dir": ("~/customers/acme", "acme"),
    "train_file": (["/home/me/acme/train.en", "parts/train.de.gz"], ["train.en", "train.de.gz"]),
    "validation_file": (["$HOME/dev.jsonl"], ["dev.jsonl"]),
    "test_file": (["test.en", "test.de"], ["test.en", "test.de"]),
    "model": ("/home/me/base", "base"),
    "tokenizer": ("NAME/tokenizer", "NAME/tokenizer"),
    "dataset": ("./corpus", "corpus"),
    "deepspeed": ('{"a": "b/c"}', '{"a": "b/c"}'),
    "fsdp_config": ("/home/me/fsdp.json", "fsdp.json"),
    "target_lang": ("no", "no"),
    "warmup_steps": (4000, 4000),
    "save_total_limit": (None, None),
}


def test_a_public_recipe_names_files_without_their_folders():
    assert public({name: own for name, (own, _) in PUBLIC.items()}) == {
        name: shared for name, (_, shared) in PUBLIC.items()
    }


def test_a_relative_name_is_a_folder_where_there_is_one_and_else_a_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert public({"model": "runs/mine", "dataset": "phrasebook:en-de"}) == {
        "model": "runs/mine",
        "dataset": "phrasebook:en-de",
    }
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert public({"model": "runs/mine"}) == {"model": "mine"}
