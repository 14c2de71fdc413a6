package harness

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"
)

const (
	memoryChunk = 1 << 20
	pageSize    = 4096
)

// Memory looks through everything that the process can read in its own memory:
// more than a core dump has, since what is marked to be left out of one
// (MADV_DONTDUMP) is read here too. The process is stopped while its memory is
// copied. A page that the kernel does not give out (a device's, the vvar page) is
// passed over.
func (s *Scanner) Memory(ctx context.Context, p Process) (found []Finding, n Scanned, err error) {
	pieces, free, err := copyMemory(ctx, p)
	if err != nil {
		return nil, n, err
	}
	defer func() { err = errors.Join(err, free()) }()
	for _, piece := range pieces {
		n.Files++
		n.Bytes += int64(len(piece.b))
		found = append(found, s.Bytes(fmt.Sprintf("the memory of %s from %#x on (%s)", p.Name, piece.at, piece.what), piece.b)...)
	}
	return found, n, nil
}

// copyMemory returns the memory of a process in pieces without gaps, until free.
func copyMemory(ctx context.Context, p Process) (pieces []memoryPiece, free func() error, err error) {
	if err := p.Pause(ctx); err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, p.Resume()) }()
	ranges, err := readable(p.PID)
	if err != nil {
		return nil, nil, err
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", p.PID))
	if err != nil {
		return nil, nil, fmt.Errorf("read the memory of %s: %w", p.Name, err)
	}
	defer mem.Close()
	c, err := newCopied(ranges)
	if err != nil {
		return nil, nil, err
	}
	for _, r := range ranges {
		if err := c.read(mem, r); err != nil {
			return nil, nil, errors.Join(fmt.Errorf("read the memory of %s: %w", p.Name, err), c.free())
		}
	}
	return c.pieces, c.free, nil
}

// memoryPiece is a stretch of memory in which no page is all zero.
type memoryPiece struct {
	at   int64
	what string
	b    []byte
}

// memoryRange is a mapping of a process as in proc(5).
type memoryRange struct {
	from, to int64
	what     string // path, [heap], [stack], or nothing for anonymous memory
}

// readable lists the mappings that the process itself may read.
func readable(pid int) ([]memoryRange, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out []memoryRange
	for l := bufio.NewScanner(f); l.Scan(); {
		fields := strings.Fields(l.Text())
		var r memoryRange
		if len(fields) < 5 {
			return nil, fmt.Errorf("/proc/%d/maps is not understood", pid)
		}
		if fields[1][0] != 'r' {
			continue
		}
		if len(fields) > 5 {
			r.what = strings.Join(fields[5:], " ")
		}
		switch r.what {
		case "[vvar]", "[vvar_vclock]", "[vsyscall]": // the kernel's own
			continue
		}
		if _, err := fmt.Sscanf(fields[0], "%x-%x", &r.from, &r.to); err != nil {
			return nil, fmt.Errorf("/proc/%d/maps is not understood: %w", pid, err)
		}
		out = append(out, r)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("process %d shows no memory", pid)
	}
	return out, nil
}

// copied is a copy of a process's memory. Its bytes lie outside the heap: hundreds of
// megabytes pass through here, which neither the garbage collector nor the race
// detector has to follow.
type copied struct {
	room   []byte // as much as could be needed; only what is used takes memory
	used   int
	pieces []memoryPiece
}

func newCopied(ranges []memoryRange) (*copied, error) {
	size := int64(memoryChunk)
	for _, r := range ranges {
		size += r.to - r.from
	}
	room, err := syscall.Mmap(-1, 0, int(size), syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON|syscall.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("%d bytes for a copy of memory: %w", size, err)
	}
	return &copied{room: room}, nil
}

func (c *copied) free() error {
	c.pieces = nil
	return syscall.Munmap(c.room)
}

// read appends the mapping's pieces. Pages of zeros end a piece, as do those that
// are not given out: no secret lies across them.
func (c *copied) read(mem *os.File, r memoryRange) error {
	what := r.what
	if what == "" {
		what = "anonymous"
	}
	open := false // the last piece goes on
	for at := r.from; at < r.to; {
		chunk := c.room[c.used:][:min(memoryChunk, r.to-at)]
		got, err := mem.ReadAt(chunk, at)
		if err != nil && !errors.Is(err, io.EOF) && !refusedPage(err) {
			return fmt.Errorf("at %#x (%s): %w", at, what, err)
		}
		for page := range slices.Chunk(chunk[:got], pageSize) {
			if bytes.Equal(page, zeroPage[:len(page)]) {
				open = false
			} else {
				c.add(at, what, page, open)
				open = true
			}
			at += int64(len(page))
		}
		if err != nil { // pass over one page that is not given out
			at, open = (at/pageSize+1)*pageSize, false
		}
	}
	return nil
}

// add appends a page, to the last piece if that goes on. The page lies in room itself,
// at or above the place where it comes to lie.
func (c *copied) add(at int64, what string, page []byte, more bool) {
	end := c.used + copy(c.room[c.used:], page)
	if more {
		last := &c.pieces[len(c.pieces)-1]
		last.b = c.room[end-len(page)-len(last.b) : end]
	} else {
		c.pieces = append(c.pieces, memoryPiece{at, what, c.room[c.used:end]})
	}
	c.used = end
}

var zeroPage [pageSize]byte

func refusedPage(err error) bool {
	return errors.Is(err, syscall.EIO) || errors.Is(err, syscall.EFAULT)
}
