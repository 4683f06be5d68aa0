//! Puts the steering of a guest's memory on an event loop.

use balloon::mechanism::steering::Steering;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

/// Serves the events of a [`Steering`].
pub struct Steered(pub Steering);

impl MutEventSubscriber for Steered {
    fn init(&mut self, ops: &mut EventOps) {
        for (number, descriptor) in (0u32..).zip(self.0.events()) {
            if let Err(error) = ops.add(Events::with_data_raw(descriptor, number, EventSet::IN)) {
                tracing::error!("the guest's memory can't be steered: {error}");
            }
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps) {
        if let Ok(number) = usize::try_from(events.data()) {
            self.0.event(number);
        }
    }
}
