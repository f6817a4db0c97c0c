"""Reward functions of online reinforcement learning: what an answer was worth."""
