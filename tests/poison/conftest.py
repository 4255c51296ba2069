from tests.poison.corpora import clean, lower  # noqa: F401
