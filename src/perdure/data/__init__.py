"""Where samples come from: one small reader per layout, all with the same :class:`~perdure.data.source.Source` face."""
