"""The command: what it writes, and what it says of bad input."""

import re
from pathlib import Path

import pytest
import torch

from discdiff import samplers as S
from discdiff.adapters.own import load_trained
from discdiff.command.cli import main, picture
from discdiff.demo.data import ASSETS, Vocabulary, digits, text, text_from_topics
from discdiff.demo.models import Card, build, save_trained
from discdiff.losses import Blocks
from discdiff.losses import base as losses
from discdiff.samplers.expression import parse_operator


@pytest.mark.parametrize("process", ["masked", "uniform"])
def test_sample_digits_writes_a_picture(process: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "digits.png"
    assert main(["sample", "digits", "--process", process, "--steps", "2", "--batch", "3", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    said = capfd.readouterr()
    assert "nfe 2, " in said.err
    assert "tokens/s" in said.err
    assert f"wrote {out}" in said.out


def test_sample_text_begins_with_the_prompt(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["sample", "text", "--steps", "2", "--batch", "2", "--length", "40", "--prompt", "The "]
    assert main([*words, "--process", "uniform", "--sampler", "ancestral >> gibbs(sites=2)"]) == 0
    lines = capfd.readouterr().out.rstrip("\n").split("\n\n")
    assert len(lines) == 2
    assert all(line.startswith("The ") and len(line) == 40 for line in lines)
    assert main([*words, "--out", str(tmp_path / "text.txt")]) == 0
    assert (tmp_path / "text.txt").read_text().startswith("The ")


def test_sample_text_block_by_block(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["sample", "text", "--blocks", "16", "--batch", "2"]
    assert main([*words, "--corrector", "arpc", "--length", "128", "--steps", "3"]) == 0
    said = capfd.readouterr()
    assert [len(row) for row in said.out.rstrip("\n").split("\n\n")] == [128, 128]
    assert "nfe 40, " in said.err  # 8 blocks of 3 calls, and one more in each of the 2 guided steps
    more = ["--process", "uniform", "--steps", "2", "--length", "140", "--prompt", "The ", "--corrector", "gibbs(4)"]
    assert main([*words, *more]) == 0
    said = capfd.readouterr()
    assert all(row.startswith("The ") and len(row) == 140 for row in said.out.rstrip("\n").split("\n\n"))
    assert "window=128" in said.err
    assert main([*words, "--length", "16"]) == 0
    assert "steps=16, " in capfd.readouterr().err  # as many as the block has sites


def test_sensitivity_plots_both_readings(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sensitivity.png"
    assert main(["sensitivity", "digits", "--rows", "16", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    said = capfd.readouterr().out
    assert "read as loo" in said
    assert "read as denoiser" in said
    loo, denoiser = (float(cell.split("±")[0]) for cell in re.search(r"0\.7 +│([^│]+)│([^│]+)", said).groups())
    assert loo < denoiser / 2  # the example's network says O
    assert main(["sensitivity", "digits", "--weights", str(ASSETS / "digits-masked.safetensors")]) == 2
    assert "needs a process whose tokens can be noise" in capfd.readouterr().err
    assert main(["sensitivity", "digits", "--out", str(tmp_path / "no" / "x.png")]) == 2
    assert "there is no folder" in capfd.readouterr().err
    assert main(["sensitivity", "digits", "--rows", "1", "--out", str(out)]) == 2
    assert "--rows must lie in 2.." in capfd.readouterr().err


def test_the_same_seed_gives_the_same_text(capfd: pytest.CaptureFixture[str]) -> None:
    def run(seed: int) -> str:
        assert main(["sample", "text", "--steps", "3", "--batch", "1", "--length", "20", "--seed", str(seed)]) == 0
        return capfd.readouterr().out

    assert run(5) == run(5) != run(6)


@pytest.mark.parametrize(
    ("expression", "operator"),
    [
        ("ancestral", S.Ancestral()),
        ("ancestral >> gibbs", S.Ancestral() >> S.Gibbs()),
        ("ancestral() >> gibbs(sites=2) ** 3", S.Ancestral() >> S.Gibbs(sites=2) ** 3),
        ("gibbs(4) >> (ancestral >> gibbs)", S.Gibbs(4) >> (S.Ancestral() >> S.Gibbs())),
    ],
)
def test_operators_are_read(expression: str, operator: object) -> None:
    assert parse_operator(expression) == operator


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("euler_maruyama", "cannot read 'euler_maruyama' .* accepted: adaptive, ancestral, .* unmask, literal"),
        ("ancestral >>", "is not an expression"),
        ("ancestral + gibbs", "cannot read"),
        ("__import__('os').system('true')", "cannot read"),
        ("gibbs(sites=open('x'))", "cannot read"),
        ("gibbs(size=2)", "unexpected keyword argument 'size'"),
        ("gibbs(sites=0)", "at least 1"),
        ("gibbs ** gibbs", "cannot read"),
    ],
)
def test_what_is_not_an_operator_is_refused(expression: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_operator(expression)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["text", "--prompt", "Thé"], r"characters \['é'\] that are not in the vocabulary"),
        (["text", "--length", "4000"], "at most 128 tokens, got 4000"),
        (["text", "--sampler", "gibbs"], "a step needs a predictor"),
        (["text", "--sampler", "ancestral >> ancestral"], "a step has one predictor"),
        (["text", "--steps", "0"], "steps must lie in 1.."),
        (["text", "--blocks", "0", "--steps", "2"], "--blocks must lie in 1..128, got 0"),
        (["text", "--corrector", "arcp"], "--corrector: cannot read 'arcp'"),
        (["text", "--corrector", "ancestral"], "a step has one predictor"),
        (["text", "--prompt", "too long a prompt", "--length", "3"], "--prompt: has 17 characters, and --length is 3"),
        (["text", "--seed", "-3"], "--seed must lie in"),
        (["digits", "--out", "no/such/folder/x.png"], "there is no folder no/such/folder"),
    ],
)
@pytest.mark.usefixtures("as_user")
def test_bad_words_give_one_line(words: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", *words]) == 2
    said = capfd.readouterr().err.strip().splitlines()
    errors = [line for line in said if line.startswith("discdiff: ")]
    assert len(errors) == 1
    assert re.search(message, errors[0])


def test_text_and_vocabulary_belong_together() -> None:
    tokens, vocabulary = text()
    assert tokens.max() < len(vocabulary) == 93
    assert "statement" in vocabulary.decode(tokens[:200])
    assert vocabulary.decode(vocabulary.encode("The end.")) == "The end."
    assert Vocabulary("cab").characters == "abc"
    first = (ASSETS / "topics.txt").read_text().split("\n")[0]
    assert first.split()[:2] == ["source:", "pydoc_data.topics,"]
    assert len(first.split()[-1]) == 64
    assert text_from_topics().isascii()


def test_digits_are_what_they_should_be() -> None:
    images = digits()
    assert images.shape == (1797, 64)
    assert images.min() == 0
    assert images.max() == 16
    assert picture(images[:12]).shape == (2 * 10 * 6, 10 * 10 * 6)
    zero = picture(images[:1])
    assert (zero[6:54, 6:54][::6, ::6] == images[0].view(8, 8)).all()


@pytest.mark.parametrize("name", ["digits", "text"])
@pytest.mark.parametrize("process", ["masked", "uniform"])
def test_committed_weights_know_their_data(name: str, process: str) -> None:
    """They predict hidden data far better than the frequencies of tokens do, and uniform ones keep to the LOO."""
    data = digits() if name == "digits" else text()[0][: 128 * 200].view(-1, 128)
    model = load_trained(ASSETS / f"{name}-{process}.safetensors")
    x0 = data[::17][:32]
    frequencies = torch.bincount(data.flatten(), minlength=model.process.vocab_size).double() / data.numel()
    t = model.process.schedule.time(0.7)
    x_t = model.process.marginal(x0, t).sample()
    noisy = x_t != x0
    with torch.no_grad():
        nll = -model(x_t, t).denoiser.gather(-1, x0[..., None])[..., 0][noisy].mean()
    baseline = -frequencies.log()[x0][noisy].mean()
    assert nll < 0.8 * baseline


@pytest.mark.parametrize(("process", "loss"), [("masked", losses.MaskedNELBO()), ("uniform", losses.UniformNELBO())])
def test_committed_networks_of_blocks_read_and_denoise(process: str, loss: losses.Objective) -> None:
    """One network is autoregressive at block size 1, a denoiser at 16: both bounds are far below the frequencies'."""
    x0 = text()[0][: 128 * 200].view(-1, 128)[::7][:24]
    model = load_trained(ASSETS / f"text-blocks-{process}.safetensors")
    counts = torch.bincount(x0.flatten(), minlength=model.process.vocab_size).double()
    frequencies = torch.special.entr(counts / counts.sum()).sum()
    one, many = (Blocks(loss, block).estimate(model, x0, draws=4, seed=0).value.mean() / 128 for block in (1, 16))
    assert one < many < 0.8 * frequencies


def test_a_file_keeps_its_card(tmp_path: Path) -> None:
    card = Card("sequence", "uniform", 5, 9, width=32, depth=1, predicts="loo", time="alpha")
    network, model = build(card)
    save_trained(tmp_path / "w.safetensors", network, card)
    loaded = load_trained(tmp_path / "w.safetensors")
    assert loaded.process == model.process
    x = torch.randint(5, (2, 7))
    torch.testing.assert_close(loaded(x, 0.5).logits, network(x, torch.tensor([0.5, 0.5])), atol=1e-2, rtol=1e-2)
    per_site = loaded(x, torch.full((2, 7), 0.5)).logits
    torch.testing.assert_close(per_site, loaded(x, 0.5).logits, atol=1e-5, rtol=1e-5)
