"""Data sets. A data set is a class that implements `rlhf.data.records.DataSource`; `conf/data` has one YAML for each.

- The contract: `records` (splits, records, `DataSource`).
- The data sets: `alpaca`, `imdb`, `stack_exchange` and `farm` (generated, with a known truth).
- From files to rows: `sources` (what a configuration names), `row_files` (file formats), `compression`, and for
  Stack Exchange `posts`, `thread_sources`, `threads` and `markdown`.
- From rows to records: `reading` (keep or report each row), `fields` (text fields), `splitting` (assign rows to
  splits), `templates` (prompts), `reports` (what was skipped).
- Shared tools: `options` (check configuration values), `caching` (rows in the cache of `datasets`), `grouping` (group
  rows on disk).
"""
