"""Measures responses: win rates against references, gold utility, facts. Also simulates preferences with judges."""
