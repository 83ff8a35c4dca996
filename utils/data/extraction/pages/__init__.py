"""A page of HTML as text; also what mammoth and books make HTML of."""
