"""The three stages as LightningModules: supervised fine-tuning, reward modelling, PPO."""
