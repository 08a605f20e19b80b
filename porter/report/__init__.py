"""A drift report as terminal table, JSON, HTML and JUnit."""
