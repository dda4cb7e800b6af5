"""Device side of Shoal: an agent runs its piece of a plan and talks MQTT."""
