"""Prompts answered by the policy: the rollout batch and the engines that sample it."""
