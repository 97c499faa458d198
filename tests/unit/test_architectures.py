"""The table of architectures: what is in it, and what it says of a model."""

import msgspec
import pytest

from clipval import architectures, cli, export, library
from clipval.errors import InputError

from .conftest import CONFIG


def test_a_row_survives_the_table(tmp_path, monkeypatch):
    row = architectures.Architecture(
        "b", 224, 77, 512, 49408, 0.33, 0.24, "mean 0.48 bicubic shortest", "", "ok", 1.2e-13
    )
    bare = architectures.Architecture("A", 336, 77, 768, 0, 0.0, 0.0, "", "transformers; roberta-base")
    monkeypatch.setattr(architectures, "TABLE", tmp_path / "models.csv")
    architectures.write([row, bare], architectures.TABLE)
    assert architectures.read() == [bare, row]


def test_the_table_knows_every_family():
    rows = {row.model: row for row in architectures.read()}
    assert rows["ViT-B-32"].vocabulary == 49408
    assert rows["ViT-B-16-SigLIP"].context == 64
    assert "bert-base-uncased" in rows["ViT-L-14-CLIPA"].needs
    assert rows["ViT-bigG-14"].vision_gib > 6
    assert rows["coca_ViT-B-32"].context == 76
    assert len(rows) > 130


def test_an_architecture_is_checked(tmp_path):
    row = architectures.check(CONFIG, tmp_path)
    assert row.export == architectures.SEEN
    assert row.vision < 1e-10
    assert row.text < 1e-10


def test_a_failed_export_is_the_reason_in_the_row(tmp_path, monkeypatch):
    def refuse(*arguments, **keywords):
        raise InputError("the exporter knows no such operator")

    monkeypatch.setattr(export, "export", refuse)
    row = architectures.check(CONFIG, tmp_path)
    assert row.export == "the exporter knows no such operator"
    assert msgspec.to_builtins(row)["vision"] is None


@pytest.mark.parametrize(("part", "code", "words"), [("siglip2", 0, "SO400M"), ("no-such", 2, "no architecture has")])
def test_models_can_be_searched(capsys, part, code, words):
    assert cli.main(["models", part]) == code
    assert words in "".join(capsys.readouterr())


def test_an_architecture_that_only_a_newer_open_clip_has(capsys, monkeypatch):
    """2.20.0, an NPU host's own, has no SigLIP."""
    installed = library.installed_names()
    assert "ViT-B-32" in installed
    older = [name for name in installed if "SigLIP" not in name]
    monkeypatch.setattr(library, "installed_names", lambda: older)
    monkeypatch.setattr(library.import_open_clip(), "list_models", lambda: older)
    cli.main(["models", "ViT-B-32"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    newer = "an open_clip newer than"
    assert newer in lines["ViT-B-32-SigLIP2-256"]
    assert newer not in lines["ViT-B-32"]
    with pytest.raises(InputError, match=r"'ViT-B-16-SigLIP': .*a newer one has it: pip install --upgrade"):
        library.architecture("ViT-B-16-SigLIP")
