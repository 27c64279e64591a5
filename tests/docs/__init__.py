"""The documents: their code runs, their commands parse, their links lead somewhere."""
