"""Live views: forms over plain functions. Each has `.static()`, the same numbers as HTML that needs no frontend."""

from tinylab.widgets.comparison import ComparisonView, compare_view
from tinylab.widgets.comparison_form import CompareCheckpoints
from tinylab.widgets.monitor import Monitor
from tinylab.widgets.show import Html, show_table

__all__ = ["CompareCheckpoints", "ComparisonView", "Html", "Monitor", "compare_view", "show_table"]
