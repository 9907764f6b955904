"""What is measured of answers: win rate against references, gold utility, facts."""
