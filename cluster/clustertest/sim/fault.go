package sim

import (
	"context"
	"time"
)

// fault does something to the cluster, and plans its end.
func (s *schedule) fault() {
	kinds := []struct {
		weight int
		do     func()
	}{
		{4, s.partition}, {3, s.oneWay}, {3, s.pause}, {5, s.crash}, {1, s.crashAll}, {1, s.restart},
		{3, s.slowDisk}, {2, s.clockJump}, {3, s.lossy}, {1, s.transfer}, {4, s.forge},
	}
	total := 0
	for _, k := range kinds {
		total += k.weight
	}
	n := s.rand.IntN(total)
	for _, k := range kinds {
		if n -= k.weight; n < 0 {
			k.do()
			return
		}
	}
}

// span returns how long a fault lasts: mostly shorter than an election takes, at times
// much longer.
func (s *schedule) span() time.Duration {
	if s.rand.IntN(2) == 0 {
		return between(s.rand, 50*time.Millisecond, 1500*time.Millisecond)
	}
	return between(s.rand, time.Second, 6*time.Second)
}

func (s *schedule) host() *host { return s.hosts[pick(s.rand, s.ids)] }

func (s *schedule) partition() {
	side := map[string]bool{}
	for _, id := range s.ids {
		side[id] = s.rand.IntN(2) == 0
	}
	d := s.span()
	s.count("partitions")
	s.note("partition %v for %v", side, d)
	set := func(cut bool) {
		for _, a := range s.ids {
			for _, b := range s.ids {
				if side[a] != side[b] {
					s.net.cut(a, b, cut)
				}
			}
		}
	}
	set(true)
	s.later(d, func() { set(false) })
}

func (s *schedule) oneWay() {
	a, d := s.host(), s.span()
	var to []string
	for _, b := range s.ids {
		if b != a.id && s.rand.IntN(3) > 0 {
			to = append(to, b)
		}
	}
	in := s.rand.IntN(2) == 0
	s.count("one-way cuts")
	s.note("one-way cut %s, inbound %v, %v for %v", a.id, in, to, d)
	set := func(cut bool) {
		for _, b := range to {
			if in {
				s.net.cut(b, a.id, cut)
			} else {
				s.net.cut(a.id, b, cut)
			}
		}
	}
	set(true)
	s.later(d, func() { set(false) })
}

func (s *schedule) pause() {
	h, d := s.host(), s.span()
	if l := s.leader(); l != nil && s.rand.IntN(2) == 0 {
		h = l.host
	}
	if h.alive() == nil {
		return
	}
	s.count("pauses")
	s.note("pause %s for %v", h.id, d)
	h.pause()
	s.later(d, h.resume)
}

func (s *schedule) crash() {
	h, d := s.host(), s.span()
	if l := s.leader(); l != nil && s.rand.IntN(2) == 0 {
		h = l.host
	}
	s.crashHost(h, d)
}

func (s *schedule) crashHost(h *host, d time.Duration) {
	if h.alive() == nil {
		return
	}
	s.count("crashes")
	s.note("crash %s for %v", h.id, d)
	h.resume()
	h.crash()
	s.later(d, func() { s.revive(h) })
}

func (s *schedule) crashAll() {
	for _, id := range s.ids {
		s.crashHost(s.hosts[id], s.span())
	}
}

func (s *schedule) revive(h *host) {
	if h.alive() != nil {
		return
	}
	s.note("start %s", h.id)
	if err := h.start(); err != nil {
		s.watch.fail("%v", err)
	}
}

// mend starts nodes again that have halted and ask for it, as a supervisor does.
func (s *schedule) mend() {
	for _, id := range s.ids {
		h := s.hosts[id]
		if l := h.alive(); l != nil && l.ended.Load() {
			s.count("started again")
			s.note("%s has halted", id)
			h.resume()
			h.crash()
			s.revive(h)
		}
	}
}

func (s *schedule) restart() {
	h := s.host()
	if h.alive() == nil {
		return
	}
	s.count("restarts")
	s.note("restart %s", h.id)
	h.resume()
	h.stop()
	s.revive(h)
}

func (s *schedule) slowDisk() {
	h, d := s.host(), s.span()
	slow := between(s.rand, 20*time.Millisecond, 1500*time.Millisecond)
	s.count("slow disks")
	s.note("disk of %s up to %v slow for %v", h.id, slow, d)
	h.set(func(h *host) { h.slow = slow })
	s.later(d, func() { h.set(func(h *host) { h.slow = time.Millisecond }) })
}

// clockJump sets a wall clock: of one site ahead or back, of the others back.
func (s *schedule) clockJump() {
	h := s.host()
	by := -s.span()
	if s.rand.IntN(3) == 0 {
		by *= 60
	}
	if h.site == s.suspect && s.rand.IntN(2) == 0 {
		by = -by * 10
	}
	s.count("clock jumps")
	s.note("clock of %s by %v", h.id, by)
	h.set(func(h *host) { h.offset, h.astray = by, true })
	if s.rand.IntN(2) == 0 {
		s.later(s.span(), func() { h.set(func(h *host) { h.offset = 0 }) })
	}
}

func (s *schedule) lossy() {
	loss, double, d := s.rand.Float64()*0.2, s.rand.Float64()*0.3, s.span()
	s.count("lossy times")
	s.note("loss %.2f, doubling %.2f for %v", loss, double, d)
	s.net.setLoss(loss, double)
	s.later(d, func() { s.net.setLoss(0, 0) })
}

func (s *schedule) transfer() {
	l := s.leader()
	if l == nil {
		return
	}
	s.count("transfers")
	s.note("transfer of the lead from %s", l.host.id)
	s.clients.Go(func() {
		l.host.gate(l)
		ctx, cancel := context.WithTimeout(context.Background(), s.patience)
		defer cancel()
		_ = l.node.TransferLeadership(ctx) // nobody may be able to take it over
	})
}
