from tests.poison.corpora import clean  # noqa: F401
