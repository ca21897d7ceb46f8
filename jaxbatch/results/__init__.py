"""What a study writes down and shows: records, tables, figures."""
