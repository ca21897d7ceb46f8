"""The output of a study: records, tables and figures."""
