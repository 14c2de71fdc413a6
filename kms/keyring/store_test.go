package keyring

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// value is a thing that can be destroyed once.
type value struct {
	key  int
	gone bool
}

func newValueStore(t interface{ Errorf(string, ...any) }, max int, now func() time.Time) *store[int, *value] {
	return newStore[int](max, time.Minute, now, func(v *value) {
		if v.gone {
			t.Errorf("value %d was destroyed twice", v.key)
		}
		v.gone = true
	})
}

// TestStoreDropsWhatNobodyWaitedFor: the opening ends well although it was
// given up. What it opened is destroyed: a Forget meanwhile would not have seen
// it.
func TestStoreDropsWhatNobodyWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newValueStore(t, 4, time.Now)
		opened := &value{key: 1}
		goOn := make(chan struct{})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, _, err := s.get(ctx, 1, func(context.Context) (*value, error) {
			<-goOn
			return opened, nil
		})
		if err != context.DeadlineExceeded {
			t.Errorf("got %v", err)
		}
		close(goOn)
		synctest.Wait()
		if size, _, _ := s.stats(); size != 0 || !opened.gone {
			t.Error("kept what nobody waited for")
		}
	})
}

// TestStoreForgetsALoadUnderWay: its result reaches who waits and goes with the
// last release.
func TestStoreForgetsALoadUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newValueStore(t, 4, time.Now)
		goOn := make(chan struct{})
		releases := make(chan func())
		for range 2 {
			go func() {
				_, release, err := s.get(t.Context(), 1, func(context.Context) (*value, error) {
					<-goOn
					return &value{key: 1}, nil
				})
				if err != nil {
					t.Error(err)
				}
				releases <- release
			}()
		}
		synctest.Wait()
		s.forget(func(int) bool { return true })
		close(goOn)
		first, second := <-releases, <-releases
		if size, _, _ := s.stats(); size != 0 {
			t.Error("kept what was forgotten while it was loaded")
		}
		first()
		second()
	})
}

// TestStoreModel compares with a slice of keys in the order of last use.
func TestStoreModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const limit = 3
		clock := time.Unix(0, 0)
		s := newValueStore(t, limit, func() time.Time { return clock })
		defer s.forget(func(int) bool { return true })
		type known struct {
			v       *value
			expires time.Time
		}
		model := map[int]known{}
		var order []int // least recently used first
		type user struct {
			v       *value
			release func()
		}
		var users []user
		drop := func(k int) {
			delete(model, k)
			order = slices.DeleteFunc(order, func(o int) bool { return o == k })
		}
		for range rapid.IntRange(1, 80).Draw(t, "steps") {
			switch k := rapid.IntRange(0, 5).Draw(t, "key"); rapid.IntRange(0, 5).Draw(t, "what") {
			case 0:
				clock = clock.Add(time.Duration(rapid.IntRange(0, 40).Draw(t, "seconds")) * time.Second)
			case 1:
				s.forget(func(o int) bool { return o == k })
				drop(k)
			case 2:
				s.sweep()
				for o, m := range model {
					if !clock.Before(m.expires) {
						drop(o)
					}
				}
			case 3:
				if len(users) > 0 {
					i := rapid.IntRange(0, len(users)-1).Draw(t, "user")
					users[i].release()
					users = slices.Delete(users, i, i+1)
				}
			default:
				m, hit := model[k]
				if hit && !clock.Before(m.expires) {
					drop(k)
					hit = false
				}
				opened := false
				v, release, err := s.get(context.Background(), k, func(context.Context) (*value, error) {
					opened = true
					return &value{key: k}, nil
				})
				if err != nil || opened == hit || hit && v != m.v {
					t.Fatalf("key %d: opened %v, the model says it is there: %v", k, opened, hit)
				}
				users = append(users, user{v, release})
				if !hit {
					for len(order) >= limit {
						drop(order[0])
					}
					m = known{v, clock.Add(time.Minute)}
				}
				drop(k)
				model[k], order = m, append(order, k)
			}
			for _, u := range users {
				if u.v.gone {
					t.Fatalf("value %d was destroyed in use", u.v.key)
				}
			}
		}
		for _, u := range users {
			u.release()
		}
		for _, u := range users {
			if u.v.gone == (model[u.v.key].v == u.v) {
				t.Fatalf("value %d: destroyed is %v", u.v.key, u.v.gone)
			}
		}
		if size, _, _ := s.stats(); size != len(model) {
			t.Fatalf("%d entries, the model has %d", size, len(model))
		}
	})
}
