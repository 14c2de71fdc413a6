package secret

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// slabs hands out slots of locked memory in power-of-two size classes. A slab
// is one mapping cut into equal slots; slots go back to the free list of their
// class, slabs are never unmapped, so the locked total is the high-water mark.
type slabs struct {
	mu   sync.Mutex
	free map[int][][]byte
}

var arena = slabs{free: map[int][][]byte{}}

const (
	minSlot  = 32
	slabSize = 16 << 10
)

func class(n int) int {
	c := minSlot
	for c < n {
		c <<= 1
	}
	return c
}

// get returns a zeroed slot whose length is the size class of n.
func (a *slabs) get(n int) ([]byte, error) {
	c := class(n)
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.free[c]) == 0 {
		if err := a.grow(c); err != nil {
			return nil, err
		}
	}
	list := a.free[c]
	slot := list[len(list)-1]
	a.free[c] = list[:len(list)-1]
	return slot, nil
}

// put takes a zeroed slot back.
func (a *slabs) put(slot []byte) {
	a.mu.Lock()
	a.free[len(slot)] = append(a.free[len(slot)], slot)
	a.mu.Unlock()
}

func (a *slabs) grow(c int) error {
	size := max(slabSize, c)
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return fmt.Errorf("secret: map memory: %w", err)
	}
	// Locking also fills in the pages: nothing is written before it.
	if err := unix.Mlock(mem); err != nil {
		_ = unix.Munmap(mem)
		return fmt.Errorf("secret: lock memory (raise RLIMIT_MEMLOCK, systemd: LimitMEMLOCK): %w", err)
	}
	if err := unix.Madvise(mem, unix.MADV_DONTDUMP); err != nil {
		_ = unix.Munmap(mem)
		return fmt.Errorf("secret: keep memory out of core dumps: %w", err)
	}
	// A child made by fork must not inherit the secrets.
	if err := unix.Madvise(mem, unix.MADV_WIPEONFORK); err != nil {
		_ = unix.Munmap(mem)
		return fmt.Errorf("secret: keep memory out of child processes: %w", err)
	}
	for off := 0; off < size; off += c {
		a.free[c] = append(a.free[c], mem[off:off+c:off+c])
	}
	return nil
}
