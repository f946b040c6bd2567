"""Reports and records are tables in a notebook. The table of a report or a certificate has the words that it prints."""

from dataclasses import replace
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
import imaml
from imaml.runs.results import QUERY_BATCH, SUPPORT_SET


def cells(shown):
    """Return the rows of the table and the notes below it, as text; the HTML must be well-formed."""
    page = ElementTree.fromstring(f"<div>{shown._repr_html_()}</div>")
    rows = [["".join(cell.itertext()) for cell in row] for row in page.iter("tr")]
    return rows, ["".join(note.itertext()) for note in page.findall("p")]


INNER = bl.Solution(jnp.ones(7, jnp.float32), jnp.float32(0.5), jnp.int32(4), jnp.int32(bl.Status.BUDGET_USED))
OUT = bl.Hypergradient(jnp.float32(1.25), {"a<b": jnp.arange(2.0)}, None, INNER, None)


def test_each_report_has_one_row_for_each_of_its_entries():
    comparisons = (
        bl.Comparison("dense", None, "more than 1000 unknowns"),
        bl.Comparison("unrolled", None, "", 0.1, None, "theta['a<b']", 1e-3, 1.0, 1.1),
    )
    report = bl.HypergradientReport(comparisons, "the inner problem is not solved.", False, OUT, np.ones(2))
    method = bl.MethodReport("OneStep()", 0.5, 1e-4, 0.3, None, 0, 4, bl.Status.BUDGET_USED, OUT)
    checks = (bl.Check("residual", False, "0.1", "solve it further"), bl.Check("kinks", True, "none & nowhere"))
    for shown, entries in [
        (report, [entry.name for entry in comparisons]),
        (bl.MethodComparison((method, method), "dense at the solution"), [method.label, method.label]),
        (bl.ConditionReport(checks), [check.name for check in checks]),
    ]:
        (header, *rows), notes = cells(shown)
        assert [row[0] for row in rows] == entries
        # Every word of the table and of the notes is also in the text that the report prints.
        printed = " ".join(str(shown).split())
        assert all(
            " ".join(text.split()) in printed for text in [*header, *(cell for row in rows for cell in row), *notes]
        )
    assert "theta['a<b']" in str(cells(report)[0])  # the sign < is escaped in the HTML
    assert cells(report)[1] == ["dense: more than 1000 unknowns", "NOT OK: the inner problem is not solved."]


def test_a_certificate_shows_its_numbers_and_its_reasons():
    numbers = map(jnp.float32, (0.125, 0.25, 0.0, 0.5, 2.0, 1e-3, 1e-6))
    estimate, bound, gradient, corrected, norm, inner, rounding = numbers
    findings = jnp.int32(int(bl.Finding.NONLINEAR | bl.Finding.ROUNDING))
    kind = jnp.int32(bl.CertificateKind.ESTIMATED)
    certificate = bl.Certificate(
        kind, estimate, bound, gradient, corrected, norm, inner, rounding, findings, probed=("L_g",), convex=False
    )
    rows, (title, *reasons) = cells(certificate)
    assert ["error bound", "2.500e-01", "1.250e-01"] in rows and ["error estimate", "1.250e-01", "6.250e-02"] in rows
    assert title in str(certificate) and tuple(reasons) == certificate.reasons and len(reasons) >= 3
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), certificate)
    assert cells(batch)[0][1:] == [["estimate", "6.250e-02", "6.250e-02"], ["bound", "1.250e-01", "1.250e-01"]]
    assert all(text in str(shown) for shown in (certificate, batch) for row in cells(shown)[0] for text in row)


def test_a_record_shows_its_fields_with_those_of_the_records_in_it():
    info = bl.LinearInfo(jnp.ones(2), jnp.float32(0.5), None, jnp.int32(bl.Status.MAX_STEPS))
    rows = dict(map(tuple, cells(replace(OUT, linear=info))[0]))
    assert rows["value"] == "1.25" and rows["gradient"] == "['a<b']: [0., 1.]"
    assert rows["inner.w"] == "float32[7]" and rows["inner.steps"] == "4"
    assert rows["inner.status"] == "BUDGET_USED"
    assert rows["linear.status"] == f"MAX_STEPS: {bl.Status.MAX_STEPS.message}"
    assert not {"aux", "linear.iterations", "warm_start"} & set(rows)


def test_a_record_can_be_shown_where_it_has_no_numbers():
    shown = []
    jax.jit(lambda out: shown.append(cells(out)))(OUT)
    shown += [cells(jax.eval_shape(lambda: OUT)), cells(jax.tree.map(lambda leaf: jnp.stack([leaf] * 9), OUT))]
    for (rows, _), status in zip(shown, ("int32[]", "int32[]", "int32[9]"), strict=True):
        assert dict(map(tuple, rows))["inner.status"] == status


def test_an_evaluation_has_a_row_for_each_normalisation():
    beside = imaml.Evaluation("accuracy", 0.5, 0.01, 0.2, 600, SUPPORT_SET)
    rows, notes = cells(imaml.Evaluation("accuracy", 0.55, 0.02, 0.2, 600, QUERY_BATCH, beside))
    assert rows[1:] == [
        ["accuracy", "0.5500 ± 0.0200", "600", QUERY_BATCH],
        ["accuracy", "0.5000 ± 0.0100", "600", SUPPORT_SET],
    ]
    assert notes == ["Chance: 0.2000."]


def test_a_verification_has_a_row_for_each_check():
    verification = imaml.Verification("sinusoid", 3, (bl.Check("residual", True, "1e-9"),), 1.0)
    (_, *rows), notes = cells(verification)
    assert (rows, notes) == ([["residual", "ok", "1e-9"]], ["sinusoid, 3 parameters, ok, 1 s"])


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="2 cells in each row"):
        bl.html_table(("a", "b"), [("1",)])
