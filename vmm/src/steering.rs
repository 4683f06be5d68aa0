//! Puts the steering of a guest's memory on an event loop.

use balloon::mechanism::steering::Steering;
use devices::events::Subscriber;
use event_manager::{EventOps, EventSet, Events, Result};

/// Serves the events of a [`Steering`].
pub struct Steered(pub Steering);

impl Subscriber for Steered {
    fn init(&mut self, ops: &mut EventOps) -> Result<()> {
        for (number, descriptor) in (0u32..).zip(self.0.events()) {
            ops.add(Events::with_data_raw(descriptor, number, EventSet::IN))?;
        }
        Ok(())
    }

    fn process(&mut self, events: Events, _: &mut EventOps) -> Result<()> {
        if let Ok(number) = usize::try_from(events.data()) {
            self.0.event(number);
        }
        Ok(())
    }
}
