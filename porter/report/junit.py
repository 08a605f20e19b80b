"""The report as JUnit XML, for continuous integration: one test case a limit."""

from __future__ import annotations

from xml.etree import ElementTree as xml

from porter.drift.budget import AT_MOST
from porter.report.report import DriftReport
from porter.report.words import clean, title, verdict


def to_xml(report: DriftReport) -> str:
    """A `testsuites` document: "outputs are numbers", then each limit; all drift values as properties."""
    broken = {v.measure: str(v) for v in report.violations}
    suite = xml.Element("testsuite", name="porter drift")
    properties = xml.SubElement(suite, "properties")
    for name, drift in report.drift.items():
        for measure, value in drift.to_json().items():
            xml.SubElement(properties, "property", name=clean(f"{name}.{measure}"), value=str(value))
    for part in report.attribution.parts:
        own = str(report.attribution.amount(part.own))
        xml.SubElement(properties, "property", name=clean(f"attribution.{part.name}"), value=own)
    for measure, times in report.ratio.items():
        xml.SubElement(properties, "property", name=f"over bf16.{measure}", value=str(times))
    beyond = [message for measure, message in broken.items() if measure not in report.budget]
    _case(suite, report, "outputs are numbers", "; ".join(beyond))
    for measure, limit in report.budget.items():
        _case(
            suite,
            report,
            f"{measure} {'<=' if AT_MOST[measure] else '>='} {limit:g}",
            broken.get(measure, ""),
        )
    cases, failures = (str(len(suite.findall(path))) for path in ("testcase", "testcase/failure"))
    suite.attrib |= {"tests": cases, "failures": failures, "errors": "0"}
    root = xml.Element("testsuites", tests=cases, failures=failures, errors="0")
    root.append(suite)
    xml.indent(root)
    return xml.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: xml.Element, report: DriftReport, name: str, failure: str) -> None:
    owner = title(report)
    case = xml.SubElement(suite, "testcase", classname=owner, name=name, time="0")
    if failure:
        xml.SubElement(case, "failure", message=failure, type="drift").text = clean(verdict(report))
