from tests.fixtures.exports import guided, program, run

__all__ = ["guided", "program", "run"]
