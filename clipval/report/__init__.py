"""Reports of a run: the terminal, report.json, report.md, report.html, and a comparison of two runs.

A report shows judged figures; it judges nothing itself.
"""

from clipval.report.comparison import compare as compare
from clipval.report.files import HTML as HTML
from clipval.report.files import MARKDOWN as MARKDOWN
from clipval.report.files import markdown as markdown
from clipval.report.files import page as page
from clipval.report.files import write as write
from clipval.report.junit import junit as junit
from clipval.report.panels import Assets as Assets
from clipval.report.run import JSON as JSON
from clipval.report.run import UNPROMISED as UNPROMISED
from clipval.report.run import Failure as Failure
from clipval.report.run import Run as Run
from clipval.report.run import Subject as Subject
from clipval.report.run import load as load
from clipval.report.terminal import summary as summary
