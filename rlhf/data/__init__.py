"""Data sets. A data set is a class that implements `rlhf.data.records.DataSource`; `conf/data` has one YAML for each.

- The contract: `records` (splits, records, `DataSource`).
- The data sets: `hub` (any set in a common format), `alpaca`, `imdb`, `stack_exchange`, `farm` (generated, with a known
  truth) and `mixture` (several of them); `split_sources` is what those with a source for each split have in common.
- From files to rows: `sources` (what a configuration names), `row_files` (file formats), `compression`, and for
  Stack Exchange `posts`, `thread_sources`, `threads` and `markdown`.
- From rows to records: `reading` (keep or report each row), `fields` (text fields), `splitting` (assign rows to
  splits), `templates` (prompts), `reports` (what was skipped).
- For `hub`: `column_maps` (which column is which field, which format it is), `row_formats` (a row's prompt and
  answers), `conversations`, `contexts`, `choices` (which answer is better), `row_records` (the records of a split).
- Shared tools: `options` (check configuration values), `caching` (rows in the cache of `datasets`), `grouping` (group
  rows on disk).
"""
