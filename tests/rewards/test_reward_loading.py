# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Where weights come from: local folders, the Hub's cache, the Hub, and what is said where they cannot be had."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from flowbp.rewards import REWARDS, load_reward
from flowbp.rewards.loading import MODEL_FILES, Source, find_files, find_tokenizer, parse_model_paths

SOURCE = Source("some-reward", "some/repository", ("config.json", "model.safetensors"), MODEL_FILES)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Name -> repository and file of the rewards with weights; hpsv3 and geneval want something else first.
WEIGHTS = {
    "aesthetic": ("camenduru/improved-aesthetic-predictor", "sac+logos+ava1-l14-linearMSE.pth"),
    "clip": ("openai/clip-vit-large-patch14", "model.safetensors"),
    "hpsv2.1": ("xswu/HPSv2", "HPS_v2.1_compressed.pt"),
    "imagereward": ("THUDM/ImageReward", "ImageReward.pt"),
    "pickscore": ("yuvalkirstain/PickScore_v1", "model.safetensors"),
    "pickscore/26": ("yuvalkirstain/PickScore_v1", "model.safetensors"),
    "similarity": ("openai/clip-vit-large-patch14", "model.safetensors"),
    "unifiedreward-alignment": ("CodeGoat24/UnifiedReward-qwen-7b", "model.safetensors"),
    "unifiedreward-quality": ("CodeGoat24/UnifiedReward-qwen-7b", "model.safetensors"),
    "vqa": ("Qwen/Qwen2.5-VL-7B-Instruct", "model.safetensors"),
}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the Hub."""
    folder = tmp_path / "hub"
    for name in (
        "huggingface_hub.constants.HF_HUB_CACHE",
        "huggingface_hub._snapshot_download.constants.HF_HUB_CACHE",
    ):
        monkeypatch.setattr(name, str(folder))
    return folder


def fill(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


def refusal(source: Source = SOURCE, model_path: Path | None = None) -> str:
    with pytest.raises(FileNotFoundError) as error:
        find_files(source, model_path)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_local_folder_wins(tmp_path):
    folder = fill(tmp_path / "weights", "config.json", "model.safetensors")
    assert find_files(SOURCE, folder) == folder


def test_the_cache_is_found_offline(cache):
    repository = cache / "models--some--repository"
    snapshot = fill(repository / "snapshots" / COMMIT, "config.json", "model.safetensors")
    fill(repository / "refs").joinpath("main").write_text(COMMIT)
    assert find_files(SOURCE) == snapshot
    (snapshot / "model.safetensors").unlink()
    assert f"model.safetensors not in {snapshot}" in refusal()


def test_every_shard_must_be_there(tmp_path):
    folder = fill(tmp_path / "weights", "config.json")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    fill(folder, "model-00001-of-00002.safetensors")
    assert f"got: model-00002-of-00002.safetensors not in {folder}" in refusal(model_path=folder)
    fill(folder, "model-00002-of-00002.safetensors")
    assert find_files(SOURCE, folder) == folder
    (folder / "model.safetensors.index.json").write_text("[")
    assert "is not an index of shards" in refusal(model_path=folder)


def test_local_folders_that_do_not_have_it(tmp_path):
    assert f"got: {tmp_path / 'none'} is not a folder" in refusal(model_path=tmp_path / "none")
    message = refusal(model_path=fill(tmp_path / "weights", "config.json"))
    assert f"got: model.safetensors not in {tmp_path / 'weights'}" in message
    assert "--reward_model_path some-reward=FOLDER" in message


def test_a_tokenizer_beside_the_weights_wins(tmp_path, cache):
    source = Source("some-reward", "some/tokenizer", ("vocab.json", "merges.txt"))
    assert find_tokenizer(source, fill(tmp_path / "a", "tokenizer.json")) == tmp_path / "a"
    with pytest.raises(FileNotFoundError, match="expected vocab.json, merges.txt of the repository some/tokenizer"):
        find_tokenizer(source, fill(tmp_path / "b", "model.safetensors"))


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_missing_weights_name_all_that_helps(name, cache):
    repository, file = WEIGHTS[name]
    with pytest.raises(FileNotFoundError) as error:
        load_reward(name)
    message = str(error.value)
    assert "\n" not in message
    for part in (
        f"reward {name!r}",
        repository,
        file,
        f"https://huggingface.co/{repository}",
        f"cache folder: {cache}",
        "the files are not in the cache and the Hub cannot be reached",
        f"--reward_model_path {name}=FOLDER",
    ):
        assert part in message
    # What the documentation says of the weights.
    assert repository in REWARDS[name].weights
    assert file == "model.safetensors" or file in REWARDS[name].weights


def test_a_revision_or_name_that_cannot_be(cache):
    assert "Repo id must" in refusal(Source("some-reward", "not a name", ("a",)))


class Hub(BaseHTTPRequestHandler):
    """Answers as the Hub does for a gated, an absent and a broken repository; not at all for one that is cut."""

    def do_GET(self):
        if "/cut/" in self.path:
            # No answer: the client's error for that is no OSError.
            self.close_connection = True
            return
        answers = {"gated": (403, "GatedRepo"), "absent": (401, "RepoNotFound")}
        status, code = next((answer for name, answer in answers.items() if f"/{name}/" in self.path), (500, None))
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize(
    ("repository", "reason"),
    [
        ("gated", "the repository is gated and this account was not given access"),
        ("absent", "no such repository, or a private one"),
        ("broken", "the files are not in the cache and the Hub cannot be reached"),
        ("cut", "the files are not in the cache and the Hub cannot be reached"),
    ],
)
def test_what_the_hub_refuses(tmp_path, repository, reason):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    program = (
        "from flowbp.rewards.loading import Source, find_files\n"
        f"try:\n    find_files(Source('some-reward', '{repository}/model', ('config.json',)))\n"
        "except FileNotFoundError as error:\n    print(error)\n"
    )
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_TOKEN": "hf_secret",
    }
    try:
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    message = done.stdout.strip()
    assert "\n" not in message and f"got: {reason}" in message, message
    assert f"licence and access: https://huggingface.co/{repository}/model;" in message
    assert f"cache folder: {tmp_path}/hub" in message and "hf auth login" in message
    assert "hf_secret" not in done.stdout + done.stderr


# --reward_model_path


def test_model_paths_are_parsed():
    assert parse_model_paths(["clip=a/b", "hpsv2.1=/c=d"]) == {"clip": Path("a/b"), "hpsv2.1": Path("/c=d")}
    assert parse_model_paths([]) == {}


@pytest.mark.parametrize("entry", ["clip", "=folder", "clip=", ""])
def test_bad_model_paths_are_refused(entry):
    with pytest.raises(ValueError, match=re.escape(f"expected NAME=FOLDER, got {entry!r}")):
        parse_model_paths([entry])
    with pytest.raises(ValueError, match="expected each reward once, got clip twice"):
        parse_model_paths(["clip=a", "clip=b"])


@pytest.mark.parametrize(
    ("spec", "name", "known"), [("clip,ocr", "hpsv2.1", "clip"), ("clip,ocr", "ocr", "clip"), ("ocr", "clip", "none")]
)
def test_model_paths_of_no_part_are_refused(spec, name, known, tmp_path):
    with pytest.raises(ValueError, match=f"expected model paths of {known}.*, got one of '{name}'") as error:
        load_reward(spec, {name: tmp_path})
    assert "\n" not in str(error.value)


def test_model_paths_are_not_options(tmp_path):
    with pytest.raises(ValueError, match="expected options among none; got model_path"):
        load_reward("clip", model_path=tmp_path)
