"""How each kind of table file is read, row by row; `utils.data.tables` chooses the reader."""
