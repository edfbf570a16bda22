# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Publish a run's result on the Hugging Face Hub: files on a list and nothing else; temporary failures are retried.

    python -m flowbp.publishing.push OUTPUT_DIR

pushes the results of a run, as `--push_to_hub` does at its end. The token is the client's own (`hf auth login`) or
HF_TOKEN; there is no option for it, because command lines are logged.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import httpx, validate_repo_id
from safetensors import SafetensorError, safe_open

from .card_text import hide_paths
from .published_files import LORA_FILE, TEXT_FILES, TRANSFORMER_FOLDER, allowed_files
from .run_info import one_line, redact_text

TRIES = 6
FIRST_WAIT = 2.0
"""Seconds before the second try; doubled for each further one, so 62 seconds in all."""
LONGEST_WAIT = 300.0
"""Seconds that a call waits in all, whatever the Hub asks for in Retry-After."""

WEIGHTS = "diffusion_pytorch_model"
PNG = b"\x89PNG\r\n\x1a\n"
LOG_IN = "log in with `hf auth login` or set HF_TOKEN to a token with write permission"
Answer = TypeVar("Answer")


class PushError(RuntimeError):
    """Publishing failed, in part or completely; the message is one line and says how to do it later."""


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error and those that caused it: the client wraps failures of uploads in a RuntimeError."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__
    return found


def _answer(error: BaseException) -> HfHubHTTPError | None:
    """The Hub's answer that an error comes from, None where there was no answer."""
    return next((item for item in _chain(error) if isinstance(item, HfHubHTTPError)), None)


def _status(error: BaseException) -> int | None:
    """The status of the Hub's answer, None where there was no answer."""
    answer = _answer(error)
    return None if answer is None else answer.response.status_code


def _is_temporary(error: BaseException) -> bool:
    """Whether the same request may succeed later: no answer, too many requests, or an error of the server."""
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return any(isinstance(item, httpx.HTTPError) for item in _chain(error))


def _retry_after(error: BaseException) -> float:
    """Seconds that the Hub's answer asks to wait, 0 where it does not."""
    answer = _answer(error)
    text = "" if answer is None else answer.response.headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return 0.0


def with_retries(call: Callable[[], Answer], tries: int = TRIES, first_wait: float = FIRST_WAIT) -> Answer:
    """The result of `call`, tried again after temporary failures.

    Args:
        call: a request that may be repeated.
        tries: how often at most.
        first_wait: seconds before the second try, doubled for each further one; longer where the Hub asks for it.

    Raises:
        Exception: of the last try; at once for permanent failures (401, 403, 404, ...), and where the Hub asks for
            more than `LONGEST_WAIT` seconds in all.
    """
    waited = 0.0
    for number in range(tries):
        try:
            return call()
        except Exception as error:
            wait = max(first_wait * 2**number, _retry_after(error))
            if number == tries - 1 or not _is_temporary(error) or waited + wait > LONGEST_WAIT:
                raise
            print(f"The Hub did not answer as expected; next try in {wait:g} s: {one_line(error)}", file=sys.stderr)
            time.sleep(wait)
            waited += wait
    raise ValueError(f"expected at least 1 try, got {tries}.")


def _explain(error: BaseException, repo_id: str) -> str:
    """What failed and what to do, in one line."""
    status = _status(error)
    if status == 401:
        return f"the Hub does not accept the token (401); {LOG_IN}."
    if status == 403:
        reason = one_line(_answer(error).server_message or "no reason given")
        return f"the Hub refuses to write to {repo_id} (403: {reason}); {LOG_IN}, or choose another --hub_model_id."
    return one_line(error) or type(error).__name__


def _check_login(repo_id: str) -> None:
    """Raise ValueError for a name or a token that cannot work, without sending a request."""
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"--hub_model_id {repo_id}: {one_line(error)} Expected user/name.") from None
    if get_token() is None:
        raise ValueError(f"no token for the Hugging Face Hub was found; {LOG_IN}.")


def check_access(repo_id: str, private: bool = False, tries: int = TRIES, first_wait: float = FIRST_WAIT) -> str:
    """Check, before a training, that its result can be pushed. Creates nothing.

    What a fine-grained token may do in a namespace is not known before the repository exists.

    Args:
        repo_id: `user/name`, or a name in the account of the token.
        private: whether the repository is to be private.
        tries, first_wait: see `with_retries`.

    Returns:
        `user/name`.

    Raises:
        ValueError: in one line that says what to do: bad name, no or bad token, no permission, no network, or a
            repository that exists and is public although it is to be private.
    """
    api = HfApi()

    def ask(request: Callable[[], Answer]) -> Answer:
        return with_retries(request, tries, first_wait)

    try:
        _check_login(repo_id)
        account = ask(api.whoami)
        repo_id = repo_id if "/" in repo_id else f"{account['name']}/{repo_id}"
        if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise ValueError(f"the token may only read; {LOG_IN}.")
        try:
            is_private = ask(lambda: api.model_info(repo_id)).private
        except RepositoryNotFoundError:
            _check_namespace(repo_id, account)
            return repo_id
        _check_private(repo_id, private, is_private)
    except Exception as error:
        raise ValueError(f"--push_to_hub: {_explain(error, repo_id)}") from None
    try:
        ask(lambda: api.auth_check(repo_id, write=True))
    except httpx.HTTPError as error:
        # Other answers decide nothing: not every server of this protocol has this check.
        if _status(error) in (401, 403) or _is_temporary(error):
            raise ValueError(f"--push_to_hub: {_explain(error, repo_id)}") from None
    return repo_id


def _check_namespace(repo_id: str, account: Mapping[str, Any]) -> None:
    """Raise ValueError unless a token's account may create this repository."""
    name = repo_id.partition("/")[0]
    roles = {each["name"]: each.get("roleInOrg") for each in account.get("orgs", [])}
    if name != account["name"] and roles.get(name, "read") == "read":
        own = ", ".join([account["name"], *(each for each, role in roles.items() if role != "read")])
        raise ValueError(
            f"{repo_id} does not exist, and {account['name']} may not create it; choose a --hub_model_id in {own}."
        )


def _check_private(repo_id: str, private: bool, is_private: bool | None) -> None:
    """Raise ValueError for a public repository that is to be private."""
    if private and not is_private:
        raise ValueError(
            f"{repo_id} exists and is public, and --hub_private_repo does not change that; make it private in its "
            "settings, choose another --hub_model_id, or leave --hub_private_repo out."
        )


def _without_paths(content: bytes) -> bytes:
    """A record of a run whose paths are shortened as in its card, but for prompts; other content as it is."""
    try:
        run = json.loads(content)
        hidden = {key: value if key == "images" else hide_paths(value) for key, value in run.items()}
    except (ValueError, AttributeError):
        return content
    return content if hidden == run else (json.dumps(hidden, indent=2, ensure_ascii=False) + "\n").encode()


def _operation(path: Path, output_dir: Path) -> CommitOperationAdd:
    """A file as the commit takes it, after its content was checked.

    Raises:
        ValueError: naming the file, if it holds a secret or its content does not fit its name.
    """
    name = path.relative_to(output_dir).as_posix()
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "np") as file:
                text = json.dumps(file.metadata())
        except SafetensorError as error:
            raise ValueError(f"{name} is not a safetensors file ({one_line(error)}).") from None
        content = None
    else:
        content = path.read_bytes()
        text = content.decode("utf-8", errors="replace")
        if path.suffix == ".png" and not content.startswith(PNG):
            raise ValueError(f"{name} is not a PNG file.")
    if redact_text(text) != text and (content is None or name in TEXT_FILES or path.suffix == ".json"):
        raise ValueError(f"{name} holds a secret (a token or password); remove it from the file.")
    if name == "run.json":
        content = _without_paths(content)
    # The bytes that were checked are sent; weights are large and stay on disk.
    return CommitOperationAdd(path_in_repo=name, path_or_fileobj=path if content is None else content)


def _check_weights(output_dir: Path, files: Sequence[Path]) -> None:
    """Raise ValueError where a LoRA, or a file of a transformer, is missing among the files to publish."""
    folder = output_dir / TRANSFORMER_FOLDER
    if output_dir / LORA_FILE in files:
        return
    weights = {path.name for path in files if path.parent == folder}
    if not any(name.endswith(".safetensors") for name in weights):
        raise ValueError(f"no file {LORA_FILE} and no transformer's weights in this folder.")
    index, expected = f"{WEIGHTS}.safetensors.index.json", {"config.json", f"{WEIGHTS}.safetensors"}
    if index in weights:
        shards = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
        expected = {"config.json", index, *shards}
    if weights != expected:
        name = min(weights ^ expected)
        found = "lacks" if name in expected else "has a file of another transformer,"
        raise ValueError(f"the folder {TRANSFORMER_FOLDER} {found} {name}.")


def push_folder(
    output_dir: Path, repo_id: str, private: bool = False, tries: int = TRIES, first_wait: float = FIRST_WAIT
) -> str:
    """Push the files of `allowed_files` in one commit; no commit is made if the Hub has all of them.

    If a commit succeeds but its answer is lost, the next try finds it and has nothing to do.

    Args:
        output_dir: the run's folder.
        repo_id: `user/name`, or a name in the account of the token; created if it does not exist.
        private: create it as a private one, and push to no other; else a new one has the account's default.
        tries, first_wait: of each request, see `with_retries`.

    Returns:
        The repository's address.

    Raises:
        PushError: if it failed for good. The files are kept.
    """
    words = ["python", "-m", "flowbp.publishing.push", str(output_dir), "--hub_model_id", repo_id]
    words += ["--hub_private_repo"] if private else []
    later = subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)
    try:
        files = allowed_files(output_dir)
        _check_weights(output_dir, files)
        for path in files:
            _operation(path, output_dir)
        _check_login(repo_id)
        api = HfApi()
        repository = with_retries(
            lambda: api.create_repo(repo_id, private=private or None, exist_ok=True), tries, first_wait
        )
        if private:
            is_private = with_retries(lambda: api.model_info(repository.repo_id), tries, first_wait).private
            _check_private(repository.repo_id, private, is_private)

        def commit() -> None:
            # The client changes operations, so every try has its own.
            operations = [_operation(path, output_dir) for path in files]
            message = "FlowBP LoRA" if output_dir / LORA_FILE in files else "FlowBP transformer"
            api.create_commit(repository.repo_id, operations, commit_message=message)

        with_retries(commit, tries, first_wait)
    except Exception as error:
        raise PushError(
            redact_text(
                f"Not pushed to {repo_id}: {_explain(error, repo_id)} All files are kept in {output_dir}; push them "
                f"later with: {later}"
            )
        ) from None
    return str(repository)


def main(argv: list[str] | None = None) -> None:
    """`python -m flowbp.publishing.push`."""
    parser = argparse.ArgumentParser(prog="python -m flowbp.publishing.push", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("output_dir", type=Path, help="Folder of a run.")
    add("--hub_model_id", help="Repository. Default: the one of the run, or the folder's name.")
    add("--hub_private_repo", action="store_true", help="Private repository. Default: as the run was told.")
    add("--tries", type=int, default=TRIES, help="How often each request is tried.")
    add("--first_wait", type=float, default=FIRST_WAIT, help="Seconds before the second try, then doubled each time.")

    def error(message: str) -> None:
        # One line; argparse's own prints the usage first.
        parser.exit(2, f"{parser.prog}: error: {one_line(message)}\n")

    parser.error = error
    args = parser.parse_args(argv)
    if args.tries < 1 or not args.first_wait >= 0:
        parser.error(
            f"--tries must be at least 1 and --first_wait not negative, got {args.tries} and {args.first_wait:g}"
        )
    if not args.output_dir.is_dir():
        parser.error(f"{args.output_dir} is not a folder; give the --output_dir of a run")
    record = args.output_dir / "run.json"
    of_run, private = None, args.hub_private_repo
    try:
        if record.exists():
            content = json.loads(record.read_text(encoding="utf-8"))
            of_run = content["hub_model_id"]
            private = private or content.get("settings", {}).get("hub_private_repo", False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as wrong:
        if args.hub_model_id is None:
            parser.error(f"{record} cannot be read as a run's record ({wrong}); give --hub_model_id")
        of_run = args.hub_model_id
    repo_id = args.hub_model_id or of_run or args.output_dir.resolve().name
    try:
        if record.exists() and repo_id != of_run:
            repo_id = check_access(repo_id, private, args.tries, args.first_wait)
            if repo_id != of_run:
                # Here, because it imports diffusers: seconds that most pushes do not need.
                from .model_card import name_repository

                name_repository(args.output_dir, repo_id)
        print(push_folder(args.output_dir, repo_id, private, args.tries, args.first_wait))
    except (ValueError, OSError, PushError) as failure:
        sys.exit(f"{parser.prog}: error: {one_line(failure)}")


if __name__ == "__main__":
    main()
